package hyperv

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/wsman"
)

// soon fails the test if f takes as long as nobody who pressed Ctrl-C waits.
func soon(t *testing.T, what string, f func() error) (err error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err = <-done:
	case <-time.After(3 * time.Minute):
		t.Fatalf("%s does not end", what)
	}
	return err
}

// What the guest writes is looked at through the node that serves the files now,
// wherever the VM is.
func TestDeltasAreWatchedThroughAnotherNode(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	l := newFailing(t)
	l.driver.watchTime = 20 * time.Millisecond
	s, err := l.driver.Begin(t.Context(), l.vm, hypervisor.Options{RepoID: ourRepo, ScratchLimit: 6 << 20})
	if err != nil {
		t.Fatal(err)
	}
	l.dismount()
	d := s.Disks()[0]
	if _, err := d.ReadAt(make([]byte, 1<<20), 8<<20); err != nil {
		t.Fatal(err)
	}
	if d := s.(*session).roam.serving(`C:\VMs\web.vhdx`); d != l.driver {
		t.Errorf("a node's own file is asked of %s", d.called())
	}
	if err := l.nodes[0].WriteBytes(l.vm, 0, 0, bytes.Repeat([]byte{1}, 8<<20)); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(3 * time.Minute); err == nil && time.Now().Before(until); time.Sleep(time.Millisecond) {
		_, err = d.ReadAt(make([]byte, 10), 0)
	}
	if !errors.Is(err, ErrDelta) {
		t.Errorf("8 MiB were written, and 6 are allowed: %v", err)
	}
	mustAbort(t, s)
	l.wantLeft(0)
}

// Ctrl-C ends the wait for another node, whoever waits, and what was made is
// taken away all the same.
func TestCtrlCEndsAnOutage(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	begin := func(t *testing.T) (*failing, *session, context.Context, context.CancelFunc) {
		l := newFailing(t)
		l.driver.roamTime, l.driver.failTime = time.Hour, time.Hour
		ctx, cancel := context.WithCancel(t.Context())
		s, err := l.driver.Begin(ctx, l.vm, hypervisor.Options{RepoID: ourRepo})
		if err != nil {
			t.Fatal(err)
		}
		return l, s.(*session), ctx, cancel
	}
	t.Run("no node has the files", func(t *testing.T) {
		t.Parallel()
		l, s, _, cancel := begin(t)
		for _, samba := range l.sambas {
			samba.Kill()
		}
		time.AfterFunc(3*time.Second, cancel)
		err := soon(t, "the read", func() error {
			_, err := s.Disks()[0].ReadAt(make([]byte, 8<<20), 4<<20)
			return err
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("read: %v", err)
		}
		mustAbort(t, s)
		l.wantLeft(0)
	})
	t.Run("no node has the VM yet", func(t *testing.T) {
		t.Parallel()
		l, s, ctx, cancel := begin(t)
		l.sambas[0].Kill()
		if err := l.ends[0].Close(); err != nil {
			t.Fatal(err)
		}
		l.ends[0] = nil
		if _, err := s.Disks()[0].ReadAt(make([]byte, 8<<20), 4<<20); err != nil {
			t.Fatal(err)
		}
		for until := time.Now().Add(3 * time.Minute); len(s.moving) == 0 && time.Now().Before(until); {
			time.Sleep(time.Millisecond) // until it is looked for
		}
		time.AfterFunc(time.Second, cancel)
		if err := soon(t, "the check", func() error { return s.Check(ctx) }); err == nil {
			t.Error("the VM was found on no node, and the check finds nothing wrong")
		}
		if err := l.Fail("HV01"); err != nil {
			t.Fatal(err)
		}
		if err := soon(t, "the abort", func() error { return s.Abort(ctx) }); err != nil {
			t.Errorf("abort: %v", err)
		}
		l.wantLeft(0)
	})
}

// A silence is files of a node that took a connection and answers no more.
type silence struct {
	files
	until chan struct{}
}

func (s silence) open(context.Context, string) (image.File, error) { return silent{s.until}, nil }

type silent struct{ until chan struct{} }

func (silent) Name() string   { return "silent" }
func (silent) Bytes() int64   { return 1 << 20 }
func (s silent) Close() error { <-s.until; return nil }

func (s silent) ReadAt(p []byte, off int64) (int, error) {
	return s.ReadAtContext(context.Background(), p, off)
}

func (s silent) ReadAtContext(ctx context.Context, _ []byte, _ int64) (int, error) {
	select {
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-s.until:
		return 0, io.ErrUnexpectedEOF
	}
}

// A node that opens a file and does not let it be read is given up when its time
// is over, or the run's is.
func TestSilentNodeIsGivenUp(t *testing.T) {
	for _, c := range []struct {
		name     string
		openTime time.Duration
		over     bool
		want     error
	}{
		{"its time is over", time.Millisecond, false, context.DeadlineExceeded},
		{"the run is over", time.Hour, true, context.Canceled},
	} {
		until := make(chan struct{})
		d := &Driver{host: &url.URL{Host: "hv01"}, files: silence{until: until}, cluster: &cluster{}, client: &client{poll: time.Millisecond}, openTime: c.openTime, nodeOutage: time.Millisecond}
		b := &beginning{d: d}
		var cancel context.CancelFunc
		b.reading, cancel = context.WithCancel(t.Context())
		if c.over {
			time.AfterFunc(10*time.Millisecond, cancel)
		}
		m := &movable{r: newRoamer(b), name: "disk", f: silent{until}, at: d}
		err := soon(t, c.name, func() error {
			err := m.move(0, smb.ErrLost)
			m.Close()
			return err
		})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		cancel()
		close(until)
	}
}

// An address that is the cluster's own leads to another node after a failover,
// where the same file may have another number. It is read on if it is the same
// by all that is known of it, and else the VM is backed up anew.
func TestNumberOfAFileChanges(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	for _, c := range []struct {
		name   string
		change func(data []byte, written *time.Time) []byte
		same   bool
	}{
		{"nothing else", func(data []byte, _ *time.Time) []byte { return data }, true},
		{"its beginning, too", func(data []byte, _ *time.Time) []byte { data[100] ^= 1; return data }, false},
		{"its end, too", func(data []byte, _ *time.Time) []byte { data[len(data)-1] ^= 1; return data }, false},
		{"its length, too", func(data []byte, _ *time.Time) []byte { return append(data, 0) }, false},
		{"its time, too", func(data []byte, at *time.Time) []byte { *at = at.Add(time.Millisecond); return data }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newFailing(t)
			s := l.begin(l.vm)
			d := s.Disks()[0].(*disk)
			if _, err := d.ReadAt(make([]byte, 10), 0); err != nil {
				t.Fatal(err)
			}
			file := l.nodes[0].Local(d.info.Source)
			undo := l.replace(file, c.change)
			l.sambas[0].Kill()
			if err := l.sambas[0].Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 8<<20)
			_, err := d.ReadAt(got, 4<<20)
			var again *hypervisor.RetryError
			switch {
			case c.same && err != nil:
				t.Errorf("it is the same file: %v", err)
			case c.same && !bytes.Equal(got, l.disk[4<<20:][:len(got)]):
				t.Error("what is read is not what the guest wrote")
			case c.same:
				if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
					t.Errorf("check: %v", err)
				}
			case !errors.As(err, &again) || !errors.Is(err, smb.ErrChanged):
				t.Errorf("it is another file: %v", err)
			}
			undo()
			mustAbort(t, s)
			l.wantLeft(0)
		})
	}
	if strayed(fault.ErrCorrupt) {
		t.Error("a damaged file is looked for elsewhere")
	}
}

// replace puts a file with another number in the place of one, and undo puts
// that back.
func (l *failing) replace(file string, change func([]byte, *time.Time) []byte) (undo func()) {
	l.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		l.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		l.Fatal(err)
	}
	at := info.ModTime()
	data = change(data, &at)
	for _, err := range []error{
		os.Link(file, file+".old"),
		os.WriteFile(file+".new", data, 0o666),
		os.Chmod(file+".new", info.Mode()),
		os.Chtimes(file+".new", at, at),
		os.Rename(file+".new", file),
	} {
		if err != nil {
			l.Fatal(err)
		}
	}
	return func() {
		if err := os.Rename(file+".old", file); err != nil {
			l.Fatal(err)
		}
	}
}

// A name that leads to whichever node there is: to the first one, and once it is
// down to the second.
type clusterName struct {
	management
	second management
	down   atomic.Bool
}

func (c *clusterName) Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error] {
	if c.down.Load() {
		return c.second.Query(ctx, wql)
	}
	return c.management.Query(ctx, wql)
}

func (c *clusterName) Invoke(ctx context.Context, ref wsman.Ref, method string, args ...wsman.Argument) (*wsman.Instance, error) {
	if c.down.Load() {
		return c.second.Invoke(ctx, ref, method, args...)
	}
	return c.management.Invoke(ctx, ref, method, args...)
}

// Who is asked through the cluster's name what changed may be another node than
// the one that was asked before.
func TestTrackingOfAnotherNodeUnderOneName(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	l := newFailing(t)
	prev := mustCommit(t, l.begin(l.vm))
	second, err := l.driver.at("HV02")
	if err != nil {
		t.Fatal(err)
	}
	name := &clusterName{management: l.driver.management, second: second.management}
	l.driver.management = name
	s, err := l.driver.Begin(t.Context(), l.vm, hypervisor.Options{RepoID: ourRepo, Previous: prev})
	if err != nil {
		t.Fatal(err)
	}
	d := s.Disks()[0].(*disk)
	whole := extent.Extent{Len: d.info.SizeBytes}
	for range 2 {
		if _, err := d.Changed(t.Context(), whole); err != nil {
			t.Fatal(err)
		}
		d.known = extent.Extent{} // as if the disk were larger than what one answer is about
	}
	if err := l.Move(l.vm, "HV02"); err != nil {
		t.Fatal(err)
	}
	name.down.Store(true)
	if _, err := d.Changed(t.Context(), whole); !errors.Is(err, hypervisor.ErrTrackingLost) || !strings.Contains(err.Error(), "leads to HV02 by now") {
		t.Errorf("what changed: %v", err)
	}
	name.down.Store(false)
	mustAbort(t, s)
}
