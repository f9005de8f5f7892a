"""HTML pages and charts without anything external, for the report and the inspection."""
