"""The software bill of materials of a logged model, in CycloneDX 1.6: https://cyclonedx.org

It names the model, the SHA-256 of its weights and of every other file of its folder, the checkpoint
that it was made from, the packages that it runs on, and the tools that made it.
"""

import re

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from slm.digests import Provenance
from slm.records import LoggedModel

SBOM = "sbom.cdx.json"


def sbom(model: LoggedModel, requirements: list[str]) -> str:
    """The bill of materials as JSON; `requirements` are pins, `package==version`."""
    weights = model.provenance
    described = weighed(weights, model.name, model.content, "model")
    parts = [library(*requirement.split("==")) for requirement in requirements]
    if weights.checkpoint:
        origin = weights.checkpoint
        checkpoint = weighed(origin, model.model, origin.revision, "checkpoint")
        if adapter := origin.adapter:
            merged = weighed(adapter, f"{model.model}-adapter", adapter.revision, "adapter")
            checkpoint.pedigree = Pedigree(ancestors=[merged])
        described.pedigree = Pedigree(ancestors=[checkpoint])
    bom = Bom(components=parts)
    bom.metadata.component = described
    tools = [library(*tool) for tool in (weights.origin.versions | weights.versions).items()]
    this = Component(type=ComponentType.APPLICATION, name="slm-packaging")
    bom.metadata.tools.components = [this, *tools]
    bom.register_dependency(described, parts)
    return JsonV1Dot6(bom).output_as_string(indent=2)


def weighed(provenance: Provenance, name: str, version: str, reference: str) -> Component:
    """A model with its licence, where it came from, and the digests of its files."""
    licence, source = provenance.origin.licence, provenance.source
    place = ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(source))
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        version=version,
        bom_ref=reference,
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
        purl=package_url(source),
        external_references=[place] if "://" in source else [],
        components=[
            Component(
                type=ComponentType.FILE,
                name=file,
                bom_ref=f"{reference}/{file}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            )
            for file, digest in provenance.files.items()
        ],
    )


def library(name: str, version: str) -> Component:
    """A Python package."""
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"{name}=={version}",
        purl=PackageURL("pypi", name=name, version=version),
    )


def package_url(source: str) -> PackageURL | None:
    """The purl of a pinned source, for those kinds that have one."""
    if hub := re.fullmatch(r"hf://([^/]+)/([^@]+)@(.+)", source):
        organization, name, commit = hub.groups()
        return PackageURL("huggingface", organization, name, commit)
    if package := re.fullmatch(r"pypi://([^=]+)==([^/]+)/(.+)", source):
        name, version, path = package.groups()
        return PackageURL("pypi", name=name, version=version, subpath=path)
    return None
