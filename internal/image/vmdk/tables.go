package vmdk

import "sync/atomic"

// What an extent may keep in memory of its tables. The extents of a split
// disk share it.
const tableCacheBytes = 16 << 20

// A tableCache keeps pieces of an extent's tables, each in the one place that
// its number gives it. Who finds one there takes no lock and writes nothing
// that another processor reads, so readers do not slow each other down. It is
// safe for concurrent use; what it gives must not be changed.
type tableCache []atomic.Pointer[keptTable]

type keptTable struct {
	n    int64
	data []byte // nil for a table that is not there
}

// newTableCache has room for total bytes, or for all if all tables of each
// bytes take less, and for two in any case.
func newTableCache(total, each, all int64) tableCache {
	n := int64(2)
	for 2*n*each <= total && n < all {
		n *= 2
	}
	return make(tableCache, n)
}

func (c tableCache) get(n int64) (data []byte, ok bool) {
	t := c[n&int64(len(c)-1)].Load()
	if t == nil || t.n != n {
		return nil, false
	}
	return t.data, true
}

func (c tableCache) put(n int64, data []byte) {
	c[n&int64(len(c)-1)].Store(&keptTable{n, data})
}
