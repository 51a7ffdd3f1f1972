"""Models: what a run trains, each behind one interface."""
