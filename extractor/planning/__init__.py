"""A run of extract reckoned in advance: what is missing, how fast the hardware is, who should get which GPU."""
