package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// ErrNoLocks is what the FS of a file system without locks answers to Lock.
var ErrNoLocks = errors.New("this file system has no locks")

const (
	lockDir = "lock"
	// sweepLock is held shared by everyone who may have temporary files. Its
	// dot keeps it apart from the locks that have names.
	sweepLock = lockDir + "/.tmp"
)

// Lock implements blob.Locker. On a file system without locks it holds
// nothing, like any store that is no Locker.
func (s *Store) Lock(ctx context.Context, name string, exclusive bool) (func(), error) {
	if err := check(ctx, name); err != nil {
		return nil, err
	}
	if err := s.dirs.ensure(lockDir); err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, classify(err))
	}
	release, err := s.fs.Lock(lockDir+"/"+strings.ReplaceAll(name, "/", "+"), exclusive)
	if errors.Is(err, ErrNoLocks) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, classify(err))
	}
	return release, nil
}

// Lock implements FS.
func (f osFS) Lock(name string, exclusive bool) (func(), error) {
	file, err := f.root.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(file, exclusive); err != nil {
		holder, _ := io.ReadAll(io.LimitReader(file, 200))
		file.Close()
		if errors.Is(err, fault.ErrLocked) && len(holder) > 0 {
			return nil, fmt.Errorf("held by %s: %w", strings.TrimSpace(string(holder)), err)
		}
		return nil, err
	}
	// Of several shared holders the last one's name is there: good enough for
	// a message, and nothing else reads it.
	host, _ := os.Hostname()
	note := fmt.Sprintf("process %d on %s", os.Getpid(), host)
	if err := file.Truncate(0); err == nil {
		_, _ = file.WriteAt([]byte(note+"\n"), 0)
	}
	return sync.OnceFunc(func() { file.Close() }), nil
}

// mayWrite is called before the first temporary file: it removes what crashed
// processes left, unless another that lives may own it.
func (s *Store) mayWrite() error {
	s.sweepOnce.Do(func() { s.sweepErr = s.sweep() })
	return s.sweepErr
}

func (s *Store) sweep() error {
	for _, dir := range []string{tmpDir, lockDir} {
		if err := s.dirs.ensure(dir); err != nil {
			return err
		}
	}
	if release, err := s.fs.Lock(sweepLock, true); err == nil {
		entries, err := s.fs.ReadDir(tmpDir)
		for _, e := range entries {
			// What can't be removed costs space and nothing else.
			_ = s.fs.Remove(tmpDir + "/" + e.Name)
		}
		release()
		if err != nil {
			return err
		}
	}
	// Somebody may be sweeping just now, and is soon done.
	for wait := time.Millisecond; ; wait *= 2 {
		release, err := s.fs.Lock(sweepLock, false)
		switch {
		case err == nil:
			s.releaseTmp = release
			return nil
		case errors.Is(err, ErrNoLocks):
			return nil // nobody sweeps either: that takes the lock
		case !errors.Is(err, fault.ErrLocked) || wait > 4*time.Second:
			return err
		}
		time.Sleep(wait)
	}
}

var _ blob.Locker = (*Store)(nil)
