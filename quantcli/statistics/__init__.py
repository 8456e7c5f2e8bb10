"""Statistics of layers' inputs and outputs: importance, Hessians, Fisher factors, their files."""
