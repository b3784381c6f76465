"""The comparison kit: cases every implementation must pass, shipped so that a user can test a machine."""
