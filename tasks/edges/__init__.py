"""Where the project touches the world: processes, machine facts, network, container engine. Never a decision."""
