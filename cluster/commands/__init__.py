"""The commands of mmkd, one file per half; heavy imports happen inside the commands."""
