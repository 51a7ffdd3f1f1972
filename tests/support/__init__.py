"""What the tests share: cases, what they are compared with, and programs that they run."""
