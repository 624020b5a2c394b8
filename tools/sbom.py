"""What a wheel is made of, for those who must know before they install it: a CycloneDX file.

Named are the wheel with its hash, the weights inside it with theirs, and everything that installing
it brings: what it declares, and what that declares in turn. Versions are those of constraints.txt,
with which the release was tested; who needs whom is asked of the environment that builds, so both
are said for its Python and its platform. What only an extra brings has the scope "optional".
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from cyclonedx.contrib.this.builders import this_component
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_WEIGHTS = ".safetensors"


class Wanted(NamedTuple):
    """A distribution, with the extras asked of it."""

    name: str  # canonical
    extras: frozenset[str]


def pins(constraints: Path) -> dict[str, str]:
    """The versions that a constraints file gives for this Python and platform, by name."""
    found = {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            found[canonicalize_name(requirement.name)] = specifier.version
    return {str(name): version for name, version in found.items()}


def bill(wheel: Path, *, versions: Mapping[str, str], moment: int) -> str:
    """The bill of materials of one wheel, as CycloneDX 1.6 in JSON, the same for the same wheel.

    Args:
        wheel: The built archive.
        versions: Of each distribution by canonical name; one that is missing is listed without.
        moment: The time that the file shows, in seconds since 1970.

    Raises:
        ValueError: What came out does not fit CycloneDX's own schema.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        head = BytesParser().parsebytes(archive.read(path))
        weights = {n: archive.read(n) for n in names if n.endswith(_WEIGHTS)}
    digest = _sha256(wheel.read_bytes())
    declared = [Requirement(line) for line in head.get_all("Requires-Dist", [])]
    extras = frozenset(head.get_all("Provides-Extra", []))
    needed = _reached(declared, frozenset())
    edges = _reached(declared, extras)
    main = Component(
        name=head["Name"],
        version=head["Version"],
        type=ComponentType.LIBRARY,
        bom_ref=wheel.name,
        purl=PackageURL("pypi", name=head["Name"], version=head["Version"]),
        licenses=[DisjunctiveLicense(id=head["License-Expression"])],
        hashes=[digest],
        components=[_weights_component(name, data) for name, data in sorted(weights.items())],
    )
    others = {name: _component(name, versions.get(name), name in needed) for name in edges}
    tools = ToolRepository(components=[this_component()])
    stamp = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    bom = Bom(
        components=others.values(),
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, digest.content),
        metadata=BomMetaData(component=main, timestamp=stamp, tools=tools),
    )
    bom.register_dependency(main, [others[w.name] for w in _applying(declared, extras)])
    for name, requires in edges.items():
        bom.register_dependency(others[name], [others[other] for other in sorted(requires)])
    text = JsonV1Dot6(bom).output_as_string(indent=1) + "\n"
    # Its grammars take more than a second to import.
    from cyclonedx.validation.json import JsonStrictValidator

    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the bill of {wheel.name} does not fit its schema: {str(wrong)[:200]}")
    return text


def _reached(declared: list[Requirement], extras: frozenset[str]) -> dict[str, set[str]]:
    """Everything that the declared requirements bring: name -> names of what it needs itself."""
    edges: dict[str, set[str]] = {}
    seen: set[Wanted] = set()
    waiting = list(_applying(declared, extras))
    while waiting:
        wanted = waiting.pop()
        edges.setdefault(wanted.name, set())
        if wanted not in seen:
            seen.add(wanted)
            nexts = list(_applying(_requires(wanted.name), wanted.extras))
            edges[wanted.name] |= {other.name for other in nexts} - {wanted.name}
            waiting += nexts
    return edges


def _applying(requirements: list[Requirement], extras: frozenset[str]) -> Iterator[Wanted]:
    """Those of the requirements that hold here, with these extras."""
    for requirement in requirements:
        marker = requirement.marker
        # Without extras the marker's own is the empty one.
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield Wanted(str(canonicalize_name(requirement.name)), frozenset(requirement.extras))


def _requires(name: str) -> list[Requirement]:
    """What an installed distribution declares; nothing is known of one that is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []


def _component(name: str, version: str | None, needed: bool) -> Component:
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}=={version}" if version else name,
        purl=PackageURL("pypi", name=name, version=version),
        scope=ComponentScope.REQUIRED if needed else ComponentScope.OPTIONAL,
    )


def _weights_component(name: str, data: bytes) -> Component:
    kind = ComponentType.MACHINE_LEARNING_MODEL
    return Component(name=name, type=kind, bom_ref=name, hashes=[_sha256(data)])


def _sha256(data: bytes) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(data).hexdigest())
