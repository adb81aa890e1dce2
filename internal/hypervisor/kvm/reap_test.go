//go:build linux && amd64

package kvm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// What a dead run left of a VM that libvirt has no more is taken away with the
// next backup of any VM, unless a run of it lives or it is another libvirt's.
func TestLeftoversOfOtherVMs(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	j, err := h.openJournal()
	h.ok(err)
	leave := func(uri string) (uuid, dir string) {
		uuid, dir = newUUID(), filepath.Join(h.scratchDir, "backstay-aaaaaaaa-"+newUUID())
		h.ok(os.MkdirAll(dir, 0o700))
		r, err := j.Begin(uuid, newUUID())
		h.ok(err)
		for kind, name := range map[string]string{kindScratch: dir, kindCheckpoint: "backstay-aaaaaaaa-x", kindJob: filepath.Join(dir, "nbd.sock")} {
			h.ok(r.Note(journal.Entry{Kind: kind, Name: name, Data: map[string]string{dataURI: uri}}))
		}
		h.ok(r.Close())
		return uuid, dir
	}
	_, dead := leave(h.uri.String())
	lives, living := leave(h.uri.String())
	_, elsewhere := leave("kvm:///system?socket=/other")
	id, err := parseUUID(lives)
	h.ok(err)
	l, err := h.Driver.lock(&domain{h.conn, "living", id})
	h.ok(err)
	a := h.backup(repoA, nil, hypervisor.Options{})
	if w := strings.Join(a.Warnings(), "; "); !strings.Contains(w, "removed scratch files") {
		t.Errorf("warnings %s", w)
	}
	for dir, want := range map[string]bool{dead: false, living: true, elsewhere: true} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", dir, err == nil, want)
		}
		os.RemoveAll(dir)
	}
	l.Unlock()
	if left, err := j.Machines(); err != nil || len(left) != 2 {
		t.Errorf("left in the journal: %v, %v", left, err)
	}
}

// A VM whose leftovers are just being cleared away by somebody is not refused.
func TestLockOfACleanerIsWaitedFor(t *testing.T) {
	d := &Driver{stateDir: t.TempDir()}
	dom := &domain{name: "web01", id: [16]byte{1}}
	l, _, err := d.tryLock(dom, tidying)
	if l == nil || err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, l.Unlock)
	mine, err := d.lock(dom)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Unlock()
	start := time.Now()
	if _, err := d.lock(dom); !errors.Is(err, fault.ErrLocked) || time.Since(start) > reapOthersTimeout {
		t.Errorf("a running backup: %v after %v", err, time.Since(start))
	}
	if other, who, err := d.tryLock(dom, tidying); other != nil || err != nil || !strings.HasPrefix(who, "process ") {
		t.Errorf("held by %q: %v", who, err)
	}
}

// After a call that nobody answered, a job that did begin is found and ended.
func TestBeginningThatNobodySaw(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{})
	h.ok(err)
	b := a.Session.(*session).beginning
	h.ok(b.settle(h.ctx)) // it is there
	h.ok(a.Abort(h.ctx))
	h.wantClean()
	b.dom = h.dom()
	h.ok(b.settle(h.ctx)) // it never came
}
