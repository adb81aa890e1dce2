package repo

// An lru keeps the limit values that were used last. It is not safe for
// concurrent use. It is for few values: eviction looks at all of them.
type lru[K comparable, V any] struct {
	limit int
	clock uint64
	m     map[K]*lruEntry[V]
}

type lruEntry[V any] struct {
	v    V
	used uint64
}

func (c *lru[K, V]) get(k K) (v V, ok bool) {
	e := c.m[k]
	if e == nil {
		return v, false
	}
	c.clock++
	e.used = c.clock
	return e.v, true
}

func (c *lru[K, V]) put(k K, v V) {
	if c.m == nil {
		c.m = map[K]*lruEntry[V]{}
	}
	if c.m[k] == nil && len(c.m) >= c.limit {
		var oldest K
		used := ^uint64(0)
		for k, e := range c.m {
			if e.used < used {
				oldest, used = k, e.used
			}
		}
		delete(c.m, oldest)
	}
	c.clock++
	c.m[k] = &lruEntry[V]{v, c.clock}
}

func (c *lru[K, V]) clear() { c.m = nil }
