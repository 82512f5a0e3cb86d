"""The paper, runnable: every table and every figure of it, and what one needs to read them."""
