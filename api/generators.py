"""/v1/generators: which generators are alive, how full they are, and which adapters are in whose memory."""

from api.call import Call
from api.endpoint import endpoint
from api.schemas.generators import ServedModel, ServingGenerator
from api.schemas.wire import Listed
from shared.store import adapters, base_models


@endpoint("GET /v1/generators", scope="admin")
def list_(call: Call) -> Listed[ServingGenerator]:
    """The generators that are alive, as each published itself a second ago; a base model shows once it was asked for.

    503 without a broker.
    """
    reports = sorted(call.queue.generators.alive(), key=lambda report: (report.host, report.started_unix_s))
    resident = {version_id for report in reports for engine in report.engines for version_id in engine.resident}
    with call.read() as tx:
        bases = {row.id: row.name for row in base_models.list_all(tx)}
        names = adapters.names(tx, call.tenant, resident)
    return Listed[ServingGenerator].of(
        [
            ServingGenerator.of(
                report,
                [
                    ServedModel.of(engine, model=bases[engine.base_model_id], names=names)
                    for engine in report.engines
                    if engine.base_model_id in bases
                ],
            )
            for report in reports
        ]
    )
