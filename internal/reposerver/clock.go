package reposerver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// A clock is the server's own time. It begins at what the machine's clock says
// when a server first runs here, and then counts only the time that it has
// run, by the monotonic clock: nobody who sets the machine's clock, forwards or
// backwards, moves it. It stands still while no server runs, and after a crash
// it goes back to what was last saved. So it may be late, and never early: what
// is held by it is held too long at worst.
type clock struct {
	state *file.Store
	first time.Time                     // when it began
	base  time.Time                     // what it said at since
	since time.Time                     // with a monotonic reading
	mono  func(time.Time) time.Duration // time.Since, but in tests

	mu sync.Mutex // one save at a time
}

const (
	clockName = "clock"
	saveEvery = time.Minute
)

// clockState is what is stored of a clock, in nanoseconds since 1970.
type clockState struct {
	First int64 `json:"first"`
	Now   int64 `json:"now"`
}

// openClock goes on with the clock in state, or begins one at wall.
func openClock(ctx context.Context, state *file.Store, wall time.Time, mono func(time.Time) time.Duration) (*clock, error) {
	c := &clock{state: state, first: wall.Round(0), base: wall.Round(0), since: time.Now(), mono: mono}
	b, err := readSmall(ctx, state, clockName)
	if errors.Is(err, fault.ErrNotFound) {
		// What a machine without a clock battery says would hold whatever is
		// there already for decades.
		if wall.Year() < 2025 {
			return nil, fmt.Errorf("the machine's clock says %s: set it before the first start", wall.Format(time.DateOnly))
		}
		return c, c.save(ctx)
	}
	if err != nil {
		return nil, err
	}
	var s clockState
	if err := json.Unmarshal(b, &s); err != nil || s.First <= 0 || s.Now < s.First {
		return nil, fault.Corrupt("clock", -1, "%q", b)
	}
	c.first, c.base = time.Unix(0, s.First), time.Unix(0, s.Now)
	return c, nil
}

func (c *clock) now() time.Time { return c.base.Add(c.mono(c.since)) }

func (c *clock) save(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return writeJSON(ctx, c.state, clockName, clockState{c.first.UnixNano(), c.now().UnixNano()})
}

// run saves the clock until ctx ends; failed hears of every save that failed.
func (c *clock) run(ctx context.Context, failed func(error)) {
	t := time.NewTicker(saveEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := c.save(ctx); err != nil && ctx.Err() == nil {
				failed(err)
			}
		}
	}
}

// stampSlack is how much coarser than the clock a file system may keep times.
const stampSlack = 2 * time.Second

// age is how long ago, by this clock, a file was written whose time is written.
// What was there before the clock began counts from then.
func (c *clock) age(written time.Time) time.Duration {
	if written.Before(c.first) {
		written = c.first
	}
	return c.now().Sub(written) - stampSlack
}
