"""Many devices and processes: where things lie, who does what, and how a run ends."""

from dlc_jax.distributed.mesh import (
    DATA,
    FSDP,
    PROBE,
    Team,
    cores_are_devices,
    make_mesh,
    one_device,
    said_of,
    use_all_cores,
)
from dlc_jax.distributed.run import Run, hides_bar
from dlc_jax.distributed.sharding import (
    by_rows,
    fetch,
    filled_up,
    from_first,
    from_rows_here,
    mesh_of,
    on_every_device,
    over_devices,
    partition,
    place,
    place_rows,
    positions_from_first,
    replicated,
    rows_here,
    sharding_of,
    whole_on,
    whole_rows,
)
