"""How weights are moved or rounded: transforms keep the function, rounders choose the codes."""
