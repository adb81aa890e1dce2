package file

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

// Room is kept back as files of noise, which no file system can leave out or
// compress away: .reserve/0 to .reserve/7 in the store's directory. Who finds
// the disk full and only wants to free room removes them one by one, so that a
// backup beside it finds little of what was let go.
const (
	reserveDir    = ".reserve" // its dot keeps it out of every listing
	reservePieces = 8
	pieceBytes    = 128 << 10
)

// reserveEvery is after what time a process looks again whether the room is
// there. Tests make it short.
var reserveEvery = 10 * time.Minute

// A reserve is what a store knows of the room that is kept back.
type reserve struct {
	mu       sync.Mutex
	wanted   bool
	looked   time.Time // when fill last was here
	released bool      // some of it, and not all is there again
}

// KeepReserve makes the store keep 1 MiB back for writes that blob.Freeing
// marks. It is called before the store is used; stores made by Create and Open
// keep it already.
func (s *Store) KeepReserve() { s.reserve.wanted = true }

// keepReserve sees to it, from time to time, that the room is kept back.
// Trouble with it is none: what it is for may never happen.
func (s *Store) keepReserve() {
	r := &s.reserve
	if !r.wanted || !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	if !r.looked.IsZero() && time.Since(r.looked) < reserveEvery {
		return
	}
	s.fillReserve()
}

// refillReserve makes again what this store let go, as far as there is room by
// now.
func (s *Store) refillReserve() {
	s.reserve.mu.Lock()
	defer s.reserve.mu.Unlock()
	if s.reserve.released {
		s.fillReserve()
	}
}

// fillReserve makes the pieces that are missing, as far as there is room. They
// are not synced: one that a power cut takes is made again by the next writer.
// The caller holds the reserve's mutex.
func (s *Store) fillReserve() {
	s.reserve.looked = time.Now()
	if s.dirs.ensure(reserveDir) != nil {
		return
	}
	entries, err := s.fs.ReadDir(reserveDir)
	if err != nil {
		return
	}
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name] = e.Bytes == pieceBytes
	}
	noise := make([]byte, pieceBytes)
	for i := range reservePieces {
		name := fmt.Sprint(i)
		whole, some := there[name]
		if whole {
			continue
		}
		if some && s.fs.Remove(reserveDir+"/"+name) != nil {
			return
		}
		if _, err := rand.Read(noise); err != nil || s.makePiece(name, noise) != nil {
			return
		}
	}
	s.reserve.released = false
}

func (s *Store) makePiece(name string, noise []byte) error {
	name = reserveDir + "/" + name
	f, err := s.fs.Create(name)
	if err != nil {
		return err // another process may be about it
	}
	_, err = f.Write(noise)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		_ = s.fs.Remove(name)
	}
	return err
}

// release lets one piece go for the sake of an object of size bytes, and says
// whether it did. What is larger than all that is left would be in vain.
func (s *Store) release(size int64) bool {
	s.reserve.mu.Lock()
	defer s.reserve.mu.Unlock()
	entries, err := s.fs.ReadDir(reserveDir)
	if err != nil || size > int64(len(entries))*pieceBytes {
		return false
	}
	for _, e := range entries {
		if e.Dir || strings.HasPrefix(e.Name, ".") || s.fs.Remove(reserveDir+"/"+e.Name) != nil {
			continue // another process was faster
		}
		s.reserve.released = true
		// Some file systems give room back when the removal is on disk.
		_ = s.fs.SyncDir(reserveDir)
		return true
	}
	return false
}

// full says that err means there is no room.
func full(err error) bool { return errors.Is(classify(err), fault.ErrNoSpace) }
