package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/wsman"
)

// abortMergeWait is how long an interrupted backup watches the host merge.
const abortMergeWait = 20 * time.Second

// ErrDelta says that the guest wrote more while it was backed up than allowed.
var ErrDelta = errors.New("the guest wrote more than --max-delta allows while it was backed up")

// watch looks after the host's space as long as the VM is read.
func (s *session) watch() {
	ctx, cancel := context.WithCancel(s.reading)
	s.watching, s.watched = cancel, make(chan struct{})
	var both sync.WaitGroup
	both.Go(func() { s.accompany(ctx) })
	both.Go(func() {
		for sleep(ctx, s.at().watchTime) == nil {
			if err := s.checkDelta(ctx); err != nil {
				s.fail(fmt.Errorf("VM %q: %w", s.sys.name, err))
				return
			}
		}
	})
	go func() {
		both.Wait()
		close(s.watched)
	}()
}

// accompany looks, once the VM's files are read through another node, whether
// its checkpoint is still there. If it is not, to read on is of no use. What
// can't be known now, Check asks again.
func (s *session) accompany(ctx context.Context) {
	select {
	case <-s.roam.gone:
	case <-ctx.Done():
		return
	}
	if err := s.held(ctx); errors.Is(err, fault.ErrNotFound) && ctx.Err() == nil {
		s.fail(err)
	}
}

// checkDelta looks once, through the node by which the VM's files are read now.
// What the host doesn't tell is no reason to end.
func (s *session) checkDelta(ctx context.Context) error {
	var sum int64
	for _, file := range s.deltas {
		n, err := s.checkFile(ctx, file)
		if err != nil {
			return err
		}
		sum += n
	}
	if s.o.ScratchLimit > 0 && sum > s.o.ScratchLimit {
		return fmt.Errorf("%w: %d bytes of %d", ErrDelta, sum, s.o.ScratchLimit)
	}
	return nil
}

// checkFile looks at one delta, and gives its size, 0 where that is not known. A
// node that falls silent is not waited for: another one may serve the next look.
func (s *session) checkFile(ctx context.Context, file string) (bytes int64, err error) {
	d := s.roam.serving(file)
	limited, cancel := context.WithTimeout(ctx, d.openTime)
	defer cancel()
	if n, err := d.files.size(limited, file); err == nil {
		bytes = n
	}
	if err := d.checkSpace(limited, file); err != nil && ctx.Err() == nil {
		return 0, err
	}
	return bytes, nil
}

// waitMerge waits until none of the VM's disks is in one of the files that a
// checkpoint of ours made it write to.
func (d *Driver) waitMerge(ctx context.Context, s system, now wsman.Ref, deltas []string, most time.Duration) error {
	if len(deltas) == 0 {
		return nil
	}
	until, said := time.Now().Add(most), time.Now()
	var unreachable time.Time // since when
	for wait := d.poll / 16; ; wait = min(2*wait, d.watchTime) {
		files, err := d.sources(ctx, now)
		if errors.Is(err, fault.ErrNotFound) {
			return nil // the VM is gone, or its settings are
		}
		merging := slices.ContainsFunc(files, func(file string) bool {
			return slices.ContainsFunc(deltas, func(delta string) bool { return strings.EqualFold(delta, file) })
		})
		switch {
		case err == nil && !merging:
			return nil
		case err == nil:
			unreachable = time.Time{}
		case unreachable.IsZero():
			unreachable = time.Now()
		}
		if err != nil && (errors.Is(err, fault.ErrDenied) || time.Since(unreachable) > d.patience) {
			return fmt.Errorf("whether the host has merged its disks, which it does by itself, is not known: %w", err)
		}
		if time.Now().After(until) {
			return fmt.Errorf("the host has not merged its disks after %s, and goes on by itself", most)
		}
		if time.Since(said) > time.Minute {
			said = time.Now()
			d.log.Info("the host merges what the guest wrote meanwhile", "vm", s.name)
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}
