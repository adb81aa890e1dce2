package qcow2

import (
	"container/list"
	"sync"
)

// A cache keeps the values that were asked for last, and loads each once
// however many ask for it at a time. Values are shared and must not change.
type cache[K comparable, V any] struct {
	limit int // how many values, at least 1

	mu    sync.Mutex
	byKey map[K]*list.Element
	order list.List // of *cached[K, V], the most recently used first
}

type cached[K comparable, V any] struct {
	key  K
	once sync.Once
	v    V
	err  error
}

func newCache[K comparable, V any](limit int) *cache[K, V] {
	return &cache[K, V]{limit: limit, byKey: map[K]*list.Element{}}
}

// get gives the value of k, from load if it is not kept. Errors are not kept.
func (c *cache[K, V]) get(k K, load func() (V, error)) (V, error) {
	c.mu.Lock()
	el, ok := c.byKey[k]
	if ok {
		c.order.MoveToFront(el)
	} else {
		el = c.order.PushFront(&cached[K, V]{key: k})
		c.byKey[k] = el
		if c.order.Len() > c.limit {
			c.remove(c.order.Back())
		}
	}
	c.mu.Unlock()
	e := el.Value.(*cached[K, V])
	e.once.Do(func() { e.v, e.err = load() })
	if e.err != nil {
		c.mu.Lock()
		c.remove(el)
		c.mu.Unlock()
	}
	return e.v, e.err
}

func (c *cache[K, V]) remove(el *list.Element) {
	k := el.Value.(*cached[K, V]).key
	if c.byKey[k] == el {
		delete(c.byKey, k)
		c.order.Remove(el)
	}
}
