package hyperv

// How much of a disk the host is asked about at once, in bytes. Each range
// costs some 200 bytes of its answer, so that a disk written all over outgrows
// one; and a disk of 64 TiB of which little changed is not to cost thousands of
// questions.
const (
	firstWindow = 16 << 30
	leastWindow = 1 << 20
	// windowRanges is how many ranges an answer should have: half of what fits
	// into the 500 KB that hosts allow.
	windowRanges = 1000
	// windowGrowth bounds how much larger the next question is. What comes may
	// be written more densely than what was.
	windowGrowth = 8
)

// A window is how much to ask about next.
type window struct {
	bytes int64
	// most is what the host was known to be too slow for, 0 for nothing yet.
	// To find that out costs a minute each time.
	most int64
}

// answered takes note of an answer that covers done bytes with that many
// ranges.
func (w *window) answered(done int64, ranges int) {
	w.bytes = done * windowGrowth
	if ranges > 0 {
		w.bytes = min(w.bytes, done/int64(ranges)*windowRanges)
	}
	if w.most > 0 {
		w.bytes = min(w.bytes, w.most)
	}
	w.bytes = max(w.bytes, leastWindow)
}

// refused takes note that the answer to a question about n bytes was too long,
// or took too long. It is false where nothing smaller can be asked.
func (w *window) refused(n int64, slow bool) bool {
	if n <= leastWindow {
		return false
	}
	w.bytes = max(n/2, leastWindow)
	if slow {
		w.most = w.bytes
	}
	return true
}
