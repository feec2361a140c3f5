"""The store of record: every row of an index, versioned and durable, kept by Lance.

::

    docs.nest/
      nestvec.json    format version, Space, id type, precision
      record/         a Lance dataset: ids, vectors, payload
      checksums/      one file a version, as `sha256sum -c` reads them
      readers/        which versions are being read now
      lock            held by whoever writes
      desk/           where a commit is prepared; gone when it is done
"""

from nestvec.search.store.checkup import Report
from nestvec.search.store.layout import Batch
from nestvec.search.store.snapshot import Keys, Rows, Snapshot
from nestvec.search.store.store import Stats, Store, Written

__all__ = ["Batch", "Keys", "Report", "Rows", "Snapshot", "Stats", "Store", "Written"]
