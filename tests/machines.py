"""Machines that differ from a described one, for tests."""

import dataclasses

from devices.spec import PlaneName, SupernodeSpec


def with_plane_scaled(supernode: SupernodeSpec, name: PlaneName, factor: float) -> SupernodeSpec:
    """The same machine with `factor` times the bandwidth of one plane."""
    plane = supernode.planes[name]
    scaled = dataclasses.replace(
        plane,
        die_port_bytes_per_s=plane.die_port_bytes_per_s * factor,
        paths={k: dataclasses.replace(path, bytes_per_s=path.bytes_per_s * factor) for k, path in plane.paths.items()},
    )
    return dataclasses.replace(supernode, planes={**supernode.planes, name: scaled})
