package repo

import (
	"os"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
)

func TestMain(m *testing.M) {
	// Nobody waits in these tests for a person's time.
	beatEvery, pollEvery, patience = 10*time.Millisecond, time.Millisecond, 5*time.Second
	lookEvery, poison = 0, true
	os.Exit(m.Run())
}

// everyoneDies makes all sessions and vacuums of this process look like those
// of one that is gone.
func everyoneDies() {
	living.Lock()
	defer living.Unlock()
	clear(living.ids)
}

// realBeats lets sessions beat as they do for people, until the test ends.
func realBeats(t *testing.T) {
	beat, poll := beatEvery, pollEvery
	beatEvery, pollEvery = 5*time.Second, time.Second
	t.Cleanup(func() { beatEvery, pollEvery = beat, poll })
}

// noLooks keeps sessions from looking what others stored and from telling them
// before there is much to tell, which like a beat is paid for time and not for
// bytes, until the test ends.
func noLooks(t *testing.T) {
	look, after := lookEvery, indexAfter
	lookEvery, indexAfter = time.Hour, time.Hour
	t.Cleanup(func() { lookEvery, indexAfter = look, after })
}

// crashAfter is blobtest.CrashAfter for a process of which signs of life do not
// count: they come by the clock.
func crashAfter(n int, st blob.Store) *blobtest.Crash {
	return blobtest.CrashAfter(n, st).Uncounted(beatPrefix)
}

// crashAfterApplied is blobtest.CrashAfterApplied in the same way.
func crashAfterApplied(n int, st blob.Store) *blobtest.Crash {
	return blobtest.CrashAfterApplied(n, st).Uncounted(beatPrefix)
}

// stride is how far apart the steps are after which a test lets a process or a
// disk die: every step is tried, but with -short, which runs under the race
// detector, one of seven.
func stride() int {
	if testing.Short() {
		return 7
	}
	return 1
}
