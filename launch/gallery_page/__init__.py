"""The page of the program `gallery`: what lies in directories of runs, written as one HTML file."""
