package claims

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

const (
	// writeAt is the byte that is locked by who reads and writes; an owner's are
	// far from it, and all of them far from what the file holds.
	writeAt int64 = 1 << 61
	ownerAt int64 = 1 << 60

	// A log is written anew when it is twice what lives in it, and this large.
	anewAt int64 = 1 << 20
	// mostBytes is what no log has whose writers keep to shared.
	mostBytes int64 = 16 << 20
)

// shared bounds the claims in a file: to 4 MiB, or what was stored of 128 GiB of
// disks in chunks of 512 KiB. A claim's records have less than eight keys' bytes
// beside its keys.
var shared = Limits{Keys: 1 << 18, PerShare: 1 << 18, Each: 8}

// stuckAfter is how long one may read and write, which takes less than a
// millisecond: whoever does it for longer is stopped, and his file is put away.
// Tests make it short.
var stuckAfter = 8 * time.Second

// A Log is claims in a file that processes share: each reads what others have
// appended since, decides, and appends. What makes no sense is written anew, and
// nothing is ever synced. An owner locks a byte for as long as he lives, so what a
// dead one was storing is free at once.
//
// After any trouble with the file every call gives fault.ErrUnsupported. It is
// safe for concurrent use.
type Log struct {
	open   func() (File, error)
	remove func() error         // takes away the file's name
	now    func() time.Duration // since the log was made

	mu     sync.Mutex
	f      File // nil: not open
	owner  uint64
	number uint64 // of the head
	at     int64  // what is read
	anew   int64  // the length at which it is written anew
	table  *Table[blob.ClaimKey, ticket, uint64]
	over   error // no longer kept
}

// NewLog makes a log that opens its file with the first claim.
func NewLog(open func() (File, error), remove func() error) *Log {
	begun := time.Now()
	return &Log{open: open, remove: remove, now: func() time.Duration { return time.Since(begun) }}
}

// Claim implements blob.Claimer.
func (l *Log) Claim(ctx context.Context, t blob.Ticket, keys []blob.ClaimKey) (busy int, in map[int][32]byte, err error) {
	if len(keys) == 0 || len(keys) > blob.MaxClaims {
		return 0, nil, fmt.Errorf("a claim of %d keys: want 1 to %d", len(keys), blob.MaxClaims)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.enter(ctx); err != nil {
		return 0, nil, err
	}
	of := ticket{l.owner, t}
	had := l.table.End(of)
	lives := map[uint64]bool{l.owner: true}
	free := make([]blob.ClaimKey, 0, len(keys))
	for i, k := range keys {
		state, by, pack := l.table.Get(k)
		if state == Busy && !l.lives(by, lives) {
			l.table.HangUp(by)
			state = Free
		}
		switch state {
		case Free:
			free = append(free, k)
		case Busy:
			busy++
		case In:
			if in == nil {
				in = map[int][32]byte{}
			}
			in[i] = pack
		}
	}
	switch {
	case busy == 0 && l.table.Begin(of, l.owner, "", free):
		err = l.append(record{kind: kindClaim, of: of, keys: free})
	case had:
		err = l.append(record{kind: kindEnd, of: of})
	}
	if err = l.leave(err); err != nil {
		return 0, nil, err
	}
	return busy, in, nil
}

// lives says whether an owner does, and asks for each once. Where nobody can say
// he does: then he is waited for, but not for ever.
func (l *Log) lives(owner uint64, known map[uint64]bool) bool {
	if live, ok := known[owner]; ok {
		return live
	}
	live, err := l.f.Locked(ownerByte(owner))
	known[owner] = live || err != nil
	return known[owner]
}

// Settle implements blob.Claimer.
func (l *Log) Settle(ctx context.Context, t blob.Ticket, in *[32]byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil && l.over == nil {
		return nil // nothing was claimed
	}
	if err := l.enter(ctx); err != nil {
		return err
	}
	of := ticket{l.owner, t}
	var err error
	switch {
	case in != nil && l.table.Settle(of, *in):
		err = l.append(record{kind: kindStored, of: of, pack: *in})
	case in == nil && l.table.End(of):
		err = l.append(record{kind: kindEnd, of: of})
	}
	return l.leave(err)
}

// Close lets go of the file, and of everything that was claimed and not settled.
// Nothing may be called afterwards.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = fault.ErrUnsupported
	return l.detach()
}

func (l *Log) detach() error {
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f, l.table = nil, nil
	return err
}

// enter locks the file and reads what others have written since.
func (l *Log) enter(ctx context.Context) error {
	if l.over != nil {
		return l.over
	}
	since, wait := time.Now(), 20*time.Microsecond
	for tries := 0; tries < 8; {
		if l.f == nil {
			tries++
			if err := l.attach(); err != nil {
				return l.leave(err)
			}
		}
		err := l.f.Lock(writeAt)
		switch {
		case err == nil && !l.f.Gone():
			if err = l.read(); err != nil {
				return l.leave(err)
			}
			l.table.Expire()
			return nil
		case err == nil: // it was put away
			_ = l.detach()
			continue
		case !errors.Is(err, fault.ErrLocked):
			return l.leave(err)
		case time.Since(since) >= stuckAfter:
			// Who has it is stopped, and goes on in a file that nobody reads.
			if !l.f.Gone() {
				if err := l.remove(); err != nil {
					return l.leave(err)
				}
			}
			_ = l.detach()
			since = time.Now()
			continue
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, 10*time.Millisecond)
	}
	return l.leave(errors.New("its name leads to another file each time"))
}

// leave unlocks the file. After trouble there are no more claims.
func (l *Log) leave(err error) error {
	if l.f != nil && err == nil {
		err = l.f.Unlock(writeAt)
	}
	if err != nil {
		l.over = fmt.Errorf("claims: %w: %w", fault.ErrUnsupported, err)
		_ = l.detach()
		return l.over
	}
	return nil
}

// attach opens the file, as an owner that nobody has heard of.
func (l *Log) attach() error {
	f, err := l.open()
	if err != nil {
		return err
	}
	owner := rand.Uint64()
	if err := f.Lock(ownerByte(owner)); err != nil {
		_ = f.Close()
		return err
	}
	l.f, l.owner, l.at, l.number, l.anew = f, owner, 0, 0, anewAt
	l.forget()
	return nil
}

func ownerByte(owner uint64) int64 { return ownerAt + int64(owner%uint64(ownerAt)) }

func (l *Log) forget() {
	l.table = NewTable[blob.ClaimKey, ticket, uint64](shared, l.now)
}

// read takes in what others have written. The file is locked.
func (l *Log) read() error {
	size, err := l.f.Size()
	if err != nil {
		return err
	}
	var head [headBytes]byte
	if n, err := l.f.ReadAt(head[:], 0); err != nil && (err != io.EOF || n == len(head)) {
		return err
	}
	number, ok := parseHead(head[:])
	if !ok || size < int64(len(head)) || size > mostBytes {
		return l.rewrite()
	}
	first := l.at == 0
	if first || number != l.number || size < l.at {
		l.forget()
		l.number, l.at = number, int64(headBytes)
	}
	if size == l.at {
		return nil
	}
	b := make([]byte, size-l.at)
	if n, err := l.f.ReadAt(b, l.at); n < len(b) {
		return err
	}
	for len(b) > 0 {
		r, n := parseRecord(b)
		if n == 0 {
			// Its writer is dead, since we hold the lock.
			if err := l.f.Truncate(l.at); err != nil {
				return err
			}
			break
		}
		l.replay(r)
		b, l.at = b[n:], l.at+int64(n)
	}
	if first && !l.anybody() {
		// Their index objects say what they stored, or a vacuum took it.
		l.forget()
		return l.rewrite()
	}
	return nil
}

// anybody says whether one of those lives who claimed what is in the log.
func (l *Log) anybody() bool {
	known := map[uint64]bool{}
	for c := range l.table.All() {
		if l.lives(c.Of.owner, known) {
			return true
		}
	}
	return false
}

// replay does what the writer of r did. He knew best: what he claimed was free.
func (l *Log) replay(r record) {
	switch r.kind {
	case kindClaim:
		l.table.End(r.of)
		l.table.Begin(r.of, r.of.owner, "", r.keys)
	case kindStored:
		l.table.Settle(r.of, r.pack)
	case kindEnd:
		l.table.End(r.of)
	}
}

// append writes a record of what the table has already. The file is locked.
func (l *Log) append(r record) error {
	b := r.append(nil)
	if l.at+int64(len(b)) > l.anew {
		return l.rewrite()
	}
	if _, err := l.f.WriteAt(b, l.at); err != nil {
		return err
	}
	l.at += int64(len(b))
	return nil
}

// rewrite writes what the table has, and nothing else. Who dies over it leaves
// less, and nobody minds.
func (l *Log) rewrite() error {
	l.number = rand.Uint64()
	b := appendHead(nil, l.number)
	for c := range l.table.All() {
		if len(c.Keys) == 0 {
			continue
		}
		b = (&record{kind: kindClaim, of: c.Of, keys: c.Keys}).append(b)
		if c.In != nil {
			b = (&record{kind: kindStored, of: c.Of, pack: *c.In}).append(b)
		}
	}
	err := l.f.Truncate(0)
	if err == nil {
		_, err = l.f.WriteAt(b, 0)
	}
	l.at, l.anew = int64(len(b)), max(anewAt, 2*int64(len(b)))
	return err
}
