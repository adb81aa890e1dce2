package kvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A shut-off VM has no QEMU that could hold a snapshot, and libvirt makes no
// checkpoint for it. Its disks are read as they are, through qemu-nbd, and
// locked so that the VM can't start meanwhile. What the last checkpoint's
// bitmap says is still true and stays true, so that checkpoint remains the
// base of the next backup.
func (b *beginning) offline(ctx context.Context, def *libvirtxml.Domain, reason int32) (*session, error) {
	grade, why := vm.GradeCrash, "the VM is shut off, and libvirt does not know that it was shut down cleanly"
	if libvirt.DomainShutoffReason(reason) == libvirt.DomainShutoffShutdown {
		grade, why = vm.GradeApplication, ""
	}
	if libvirt.DomainShutoffReason(reason) == libvirt.DomainShutoffSaved {
		why = "the VM was saved with its memory, which the restore point does not hold"
	}
	if err := b.policy(grade, why); err != nil {
		return nil, err
	}
	b.grade = grade
	s := &session{beginning: b}
	if err := s.openImages(ctx); err != nil {
		s.hangUp()
		s.stopNBD()
		return nil, err
	}
	// From here on the locks keep it off; until here nothing did.
	// If it ran in between, it may have ended otherwise than it had before.
	on, _, now, err := b.dom.now(ctx)
	if err == nil && (on || now != reason) {
		err = fmt.Errorf("it was started while its backup began: %w", fault.ErrLocked)
	}
	if err != nil {
		s.hangUp()
		s.stopNBD()
		return nil, err
	}
	return s, nil
}

func (s *session) openImages(ctx context.Context) error {
	s.taken = time.Now()
	if err := s.run.Note(s.d.entry(kindScratch, s.dir)); err != nil {
		return err
	}
	if err := makeScratch(s.dir, -1, -1); err != nil {
		return err
	}
	for _, e := range s.defs {
		if err := s.resolve(ctx, &e); err != nil {
			return fmt.Errorf("disk %s: %w", e.ID, err)
		}
		if err := s.openImage(ctx, e); err != nil {
			return fmt.Errorf("disk %s: %w", e.ID, err)
		}
	}
	return nil
}

// resolve finds the file of a disk that is a volume of a pool.
func (b *beginning) resolve(ctx context.Context, e *diskDef) error {
	if e.path != "" {
		return nil
	}
	return b.dom.again(ctx, callTimeout, func(l *libvirt.Libvirt) error {
		pool, err := l.StoragePoolLookupByName(e.pool)
		if err != nil {
			return err
		}
		volume, err := l.StorageVolLookupByName(pool, e.volume)
		if err != nil {
			return err
		}
		e.path, err = l.StorageVolGetPath(volume)
		return err
	})
}

func (s *session) openImage(ctx context.Context, e diskDef) error {
	chain, err := s.lockChain(func() ([]imageInfo, error) { return imageChain(ctx, e.Format, e.path) })
	if err != nil {
		return err
	}
	prev := s.o.Previous[e.ID]
	base := baseOf(prev)
	f := diskFacts{id: e.ID, size: e.SizeBytes, format: e.Format, readOnly: e.readOnly,
		oldQcow2: chain[0].Specific.Data.Compat == "0.10"}
	for _, i := range chain {
		f.files = append(f.files, i.Name)
	}
	if base != "" {
		f.bitmap = imageBitmapState(chain, base)
	}
	d := &disk{s: s, info: e.Disk, bitmap: "qemu:dirty-bitmap:" + base}
	d.plan = decide(f, s.dom.uuid(), s.prefix, s.o.Previous, s.have)
	if d.plan.mode == point.Incremental || d.plan.reason == reasonSpread {
		d.change = prev.ChangeID
	}
	s.disks = append(s.disks, d)
	socket := filepath.Join(s.dir, string(e.ID)+".sock")
	if len(socket) > maxSocketPath {
		return fmt.Errorf("scratch directory %s: its name is too long for a socket in it: %w", s.d.scratchDir, fault.ErrUnsupported)
	}
	args := []string{"--read-only", "--format=" + e.Format, "--socket=" + socket, "--export-name=" + string(e.ID), "--shared=16"}
	if d.plan.mode == point.Incremental {
		args = append(args, "--bitmap="+base)
	}
	if err := s.run.Note(s.d.entry(kindNBD, socket)); err != nil {
		return err
	}
	server, err := startNBD(ctx, socket, append(args, "--", e.path))
	if err != nil {
		return err
	}
	s.servers = append(s.servers, server)
	return d.dial(ctx, socket)
}

// lockChain locks the layers that read names. What it named before they were
// locked may have changed since, with all that it said of bitmaps.
func (s *session) lockChain(read func() ([]imageInfo, error)) ([]imageInfo, error) {
	before, err := read()
	if err != nil {
		return nil, err
	}
	first := len(s.images)
	for _, i := range before {
		f, err := lockImage(i.Name)
		if err != nil {
			return nil, err
		}
		s.images = append(s.images, f)
	}
	now, err := read()
	if err != nil {
		return nil, err
	}
	same := len(now) == len(before)
	for i := 0; same && i < len(now); i++ {
		locked, err1 := s.images[first+i].Stat()
		named, err2 := os.Stat(now[i].Name)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		same = now[i].Name == before[i].Name && os.SameFile(locked, named)
	}
	if !same {
		return nil, fmt.Errorf("the chain of images changed while it was being locked: %w", fault.ErrLocked)
	}
	return now, nil
}

// stopNBD ends what serves a shut-off VM's disks and lets the VM start again.
func (s *session) stopNBD() {
	for _, p := range s.servers {
		p.stop()
	}
	for _, f := range s.images {
		f.Close()
	}
	s.servers, s.images = nil, nil
}

// An nbdServer is a qemu-nbd of ours. It ends with its last client, so it
// does not outlive us.
type nbdServer struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startNBD(ctx context.Context, socket string, args []string) (*nbdServer, error) {
	var trouble bytes.Buffer
	ready := socket + ".pid" // is written when it listens, which is after its socket has a name
	p := &nbdServer{exec.Command("qemu-nbd", append([]string{"--pid-file=" + ready}, args...)...), make(chan struct{})}
	p.cmd.Stderr = &trouble
	if err := p.cmd.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			err = fmt.Errorf("qemu-nbd, of the package qemu-utils: %w", fault.ErrNotFound)
		}
		return nil, err
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(callTimeout); ; {
		if _, err := os.Stat(ready); err == nil {
			return p, nil
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("qemu-nbd: %s", strings.TrimSpace(trouble.String()))
		case <-ctx.Done():
			p.stop()
			return nil, ctx.Err()
		case <-tick.C:
		}
		if time.Now().After(deadline) {
			p.stop()
			return nil, errors.New("qemu-nbd did not start in time")
		}
	}
}

func (p *nbdServer) stop() {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

// An imageInfo is one layer as qemu-img describes it.
type imageInfo struct {
	Name     string `json:"filename"`
	Format   string `json:"format"`
	Specific struct {
		Data struct {
			Compat  string `json:"compat"`
			Bitmaps []struct {
				Name  string   `json:"name"`
				Flags []string `json:"flags"`
			} `json:"bitmaps"`
		} `json:"data"`
	} `json:"format-specific"`
}

// imageChain describes an image and those below it, top first.
func imageChain(ctx context.Context, format, path string) ([]imageInfo, error) {
	out, err := qemuImg(ctx, "info", "--backing-chain", "--force-share", "--output=json", "-f", format, "--", path)
	if err != nil {
		return nil, err
	}
	var chain []imageInfo
	if err := json.Unmarshal(out, &chain); err != nil || len(chain) == 0 {
		return nil, fmt.Errorf("qemu-img info %s: unreadable answer: %w", path, err)
	}
	return chain, nil
}

func qemuImg(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	var out, trouble bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &trouble
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("qemu-img, of the package qemu-utils: %w", fault.ErrNotFound)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%s", strings.TrimSpace(trouble.String()))
	}
	return out.Bytes(), nil
}

// imageBitmapState looks for a checkpoint's bitmap in images that no QEMU has
// open.
func imageBitmapState(chain []imageInfo, name string) tracking {
	state := bitmapMissing
	for i, layer := range chain {
		for _, b := range layer.Specific.Data.Bitmaps {
			if b.Name != name {
				continue
			}
			flags := strings.Join(b.Flags, " ")
			switch {
			case strings.Contains(flags, "in-use"):
				return bitmapInconsistent
			case i > 0 && state == bitmapHealthy:
				return bitmapSpread
			case i > 0:
				return bitmapMissing // the top layer lacks it
			case !strings.Contains(flags, "auto"):
				return bitmapDisabled
			}
			state = bitmapHealthy
		}
	}
	return state
}

// removeImageBitmaps removes bitmaps from the top layers of a shut-off VM's
// disks.
func removeImageBitmaps(ctx context.Context, def *libvirtxml.Domain, which func(string) bool) (n int, err error) {
	for _, e := range disks(def, nil) {
		if e.Format != "qcow2" || e.path == "" || e.readOnly || e.Excluded != "" {
			continue
		}
		if _, err := os.Stat(e.path); errors.Is(err, fs.ErrNotExist) {
			continue // no disk, no bitmaps
		}
		chain, err := imageChain(ctx, e.Format, e.path)
		if err != nil {
			return n, fmt.Errorf("disk %s: %w", e.ID, err)
		}
		for _, b := range chain[0].Specific.Data.Bitmaps {
			if !which(b.Name) {
				continue
			}
			if _, err := qemuImg(ctx, "bitmap", "--remove", "-f", e.Format, "--", e.path, b.Name); err != nil {
				return n, fmt.Errorf("disk %s: remove bitmap %s: %w", e.ID, b.Name, err)
			}
			n++
		}
	}
	return n, nil
}

// Bytes that QEMU locks in an image, as file locks of the open file: one for
// each thing that it does to the image, one for each that it lets nobody do.
const (
	qemuDoes    = 100
	qemuForbids = 200
	permWrite   = 1
	permResize  = 3
)

// lockImage forbids every QEMU to write an image, as a QEMU would that reads
// it. fault.ErrLocked says that one does write it.
func lockImage(name string) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	for _, perm := range []int64{permWrite, permResize} {
		forbid := unix.Flock_t{Type: unix.F_RDLCK, Start: qemuForbids + perm, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &forbid); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		// First forbid, then look: two who do this in the other order could
		// miss each other.
		does := unix.Flock_t{Type: unix.F_WRLCK, Start: qemuDoes + perm, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &does); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if does.Type != unix.F_UNLCK {
			f.Close()
			return nil, fmt.Errorf("%s is being written by another program: %w", name, fault.ErrLocked)
		}
	}
	return f, nil
}
