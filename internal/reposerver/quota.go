package reposerver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// recountAfter is how long the server believes its own count of a repository
// that seems full: a vacuum on the server itself makes room past it.
const recountAfter = time.Minute

// quotas count what is stored in each repository, to refuse what would be more
// than a bound. What was counted once is kept up with what comes and goes over
// the network. It is safe for concurrent use.
type quotas struct {
	max int64 // bytes for each repository; 0 is no bound

	mu   sync.Mutex
	used map[string]*usage
}

type usage struct {
	mu      sync.Mutex
	bytes   int64     // stored and on their way
	coming  int64     // of them, on their way
	counted time.Time // zero for never
}

func (q *quotas) of(repo string) *usage {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used == nil {
		q.used = map[string]*usage{}
	}
	if q.used[repo] == nil {
		q.used[repo] = &usage{}
	}
	return q.used[repo]
}

// take counts size bytes as on their way, if there is room for them or they are
// not bounded. The caller says with came what became of them.
func (q *quotas) take(ctx context.Context, repo string, st *file.Store, size int64, bounded bool) error {
	if q.max <= 0 {
		return nil
	}
	u := q.of(repo)
	u.mu.Lock()
	defer u.mu.Unlock()
	full := func() bool { return size > q.max-u.bytes }
	if u.counted.IsZero() || bounded && full() && time.Since(u.counted) > recountAfter {
		var n int64
		for o, err := range st.List(ctx, "") {
			if err != nil {
				return err
			}
			n += o.Bytes
		}
		// What is on its way may be listed already: rather twice than not.
		u.bytes, u.counted = n+u.coming, time.Now()
	}
	if bounded && full() {
		return fmt.Errorf("repository %s is full: %d bytes more would be over its quota of %d, and %d are stored: %w", repo, size, q.max, u.bytes, fault.ErrNoSpace)
	}
	u.bytes += size
	u.coming += size
	return nil
}

// came ends what take began.
func (q *quotas) came(repo string, size int64, stored bool) {
	if q.max <= 0 {
		return
	}
	u := q.of(repo)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.coming -= size; !stored {
		u.bytes -= size
	}
}

// gone takes what was deleted or replaced off the count.
func (q *quotas) gone(repo string, size int64) {
	if q.max <= 0 || size == 0 {
		return
	}
	u := q.of(repo)
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.counted.IsZero() {
		u.bytes -= size
	}
}

// sizeOf is the length of an object if it counts; 0 where there is none.
func (q *quotas) sizeOf(ctx context.Context, st *file.Store, name string) (int64, error) {
	if q.max <= 0 {
		return 0, nil
	}
	n, err := st.Size(ctx, name)
	if errors.Is(err, fault.ErrNotFound) {
		return 0, nil
	}
	return n, err
}
