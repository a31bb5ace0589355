"""`miles-lite chaos`: kills processes of a run at random and holds it against one left in peace."""
