package vmdk

import (
	"container/list"
	"sync"
)

// A cache keeps the byte slices that were used last, up to a number of bytes
// in all. It is safe for concurrent use; what it gives must not be changed.
type cache struct {
	limit int64

	mu    sync.Mutex
	bytes int64
	byKey map[int64]*list.Element
	used  *list.List // front: last used
}

type cached struct {
	key  int64
	data []byte
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, byKey: map[int64]*list.Element{}, used: list.New()}
}

// get gives what is kept under key, or what load makes. Two callers that miss
// at once both load: that is cheaper than waiting.
func (c *cache) get(key int64, load func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	if e, ok := c.byKey[key]; ok {
		c.used.MoveToFront(e)
		data := e.Value.(cached).data
		c.mu.Unlock()
		return data, nil
	}
	c.mu.Unlock()
	data, err := load()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.byKey[key]; ok {
		return data, nil
	}
	c.byKey[key] = c.used.PushFront(cached{key, data})
	c.bytes += int64(len(data))
	for c.bytes > c.limit && c.used.Len() > 1 {
		old := c.used.Remove(c.used.Back()).(cached)
		delete(c.byKey, old.key)
		c.bytes -= int64(len(old.data))
	}
	return data, nil
}
