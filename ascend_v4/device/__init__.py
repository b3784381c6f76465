"""What this machine is: chips, what they compute, and what a run is asked to use."""
