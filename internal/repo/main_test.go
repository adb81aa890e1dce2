package repo

import (
	"os"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	// Nobody waits in these tests for a person's time.
	beatEvery, pollEvery, patience = 10*time.Millisecond, time.Millisecond, 5*time.Second
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
