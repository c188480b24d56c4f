"""`neartune ui`: a web page over the same functions as the command line."""
