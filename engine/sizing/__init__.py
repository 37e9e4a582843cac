"""How large everything is: from what a machine has and a model needs to the sizes of an engine. Plain numbers only."""
