package hyperv

import "testing"

// questions asks about a whole disk that has one range in each dense bytes, and
// counts how often. An answer of more than 2500 ranges does not fit.
func questions(t *testing.T, disk, dense int64) (asked, refused int) {
	t.Helper()
	w := window{bytes: firstWindow}
	for off := int64(0); off < disk; asked++ {
		n := min(w.bytes, disk-off)
		if ranges := n / dense; ranges > 2500 {
			if !w.refused(n, false) {
				t.Fatalf("%d ranges in %d bytes, and nothing smaller can be asked", ranges, n)
			}
			refused++
		} else {
			w.answered(n, int(ranges))
			off += n
		}
		if asked > 100_000 {
			t.Fatal("it goes on for ever")
		}
	}
	return asked, refused
}

func TestQuestionsOfADisk(t *testing.T) {
	for _, c := range []struct {
		name          string
		disk, dense   int64
		asked, refuse int // at most
	}{
		{"smaller than a window", 1 << 30, 1 << 40, 1, 0},
		{"64 TiB where nothing changed", 64 << 40, 1 << 60, 6, 0},
		{"64 TiB with a range in each GiB", 64 << 40, 1 << 30, 70, 0},
		{"64 GiB, every other granule", 64 << 30, 128 << 10, 64<<30/(128<<10)/900 + 10, 10},
	} {
		if asked, refused := questions(t, c.disk, c.dense); asked > c.asked || refused > c.refuse {
			t.Errorf("%s: %d questions, of which %d were refused; want at most %d and %d", c.name, asked, refused, c.asked, c.refuse)
		}
	}
}

// One dense spot, or one slow answer, says how much to ask from there on.
func TestWindowAfterRefusals(t *testing.T) {
	w := window{bytes: firstWindow}
	for w.refused(w.bytes, false) {
	}
	if w.bytes != leastWindow {
		t.Errorf("the least question is about %d bytes", w.bytes)
	}
	for range 5 {
		w.answered(w.bytes, 0)
	}
	if w.bytes < firstWindow {
		t.Errorf("behind a dense spot it asks about %d bytes", w.bytes)
	}
	w = window{bytes: firstWindow}
	w.refused(firstWindow, true)
	w.answered(firstWindow/2, 0)
	if w.bytes != firstWindow/2 {
		t.Errorf("a host that was too slow for %d bytes is asked about %d", int64(firstWindow), w.bytes)
	}
}
