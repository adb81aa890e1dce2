package repo

import (
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"sync"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// A process names the process that owns a session or a vacuum, so that another
// one beside it can tell that it is gone. Elsewhere it says nothing.
type process struct {
	Host  string `json:"host"`
	PID   int    `json:"pid"`
	Start int64  `json:"start"`
}

// thisProcess is nil where the system gives no way to tell.
func thisProcess(repo [16]byte) *process {
	place, ok := processTable()
	if !ok {
		return nil
	}
	start, err := processStart(os.Getpid())
	if err != nil {
		return nil
	}
	sum := seal.Hash(append(repo[:], place...))
	return &process{Host: hex.EncodeToString(sum[:8]), PID: os.Getpid(), Start: start}
}

// living are the ids of all sessions and vacuums of this process.
var living = struct {
	sync.Mutex
	ids map[string]bool
}{ids: map[string]bool{}}

func liveHere(id string, lives bool) {
	living.Lock()
	defer living.Unlock()
	if lives {
		living.ids[id] = true
	} else {
		delete(living.ids, id)
	}
}

// gone says that the owner of id is certainly dead. Where nobody can tell it
// is false.
func (p *process) gone(repo [16]byte, id string) bool {
	if p == nil {
		return false
	}
	self := thisProcess(repo)
	if self == nil || self.Host != p.Host {
		return false
	}
	if *self == *p {
		living.Lock()
		defer living.Unlock()
		return !living.ids[id]
	}
	start, err := processStart(p.PID)
	return errors.Is(err, fs.ErrNotExist) || err == nil && start != p.Start
}
