package claims

import "time"

// StuckAfter sets how long one may read and write, and gives what it was.
func StuckAfter(d time.Duration) (was time.Duration) {
	was, stuckAfter = stuckAfter, d
	return was
}

// SetNow gives l a time of its own; before its first claim.
func (l *Log) SetNow(now func() time.Duration) { l.now = now }

// Counted is how many keys l keeps, as they count.
func (l *Log) Counted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, _ := l.table.Len()
	return n
}

// Of the file.
const (
	WriteAt   = writeAt
	AnewAt    = anewAt
	MostBytes = mostBytes
)

// SharedKeys is how many keys a file keeps, as they count.
var SharedKeys = shared.Keys
