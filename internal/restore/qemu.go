package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/nbd"
)

const (
	qemuConnections = 2
	allocation      = "base:allocation"
)

// A qemuDevice is an image of any format that a qemu-nbd of our own holds open.
type qemuDevice struct {
	*nbd.Client
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	ended  chan error
	dir    string
}

// openThroughQemu starts qemu-nbd for the image at path. The server goes when
// its last client does, so it never outlives us.
func openThroughQemu(ctx context.Context, path string, f image.Format) (device, error) {
	program, err := exec.LookPath("qemu-nbd")
	if err != nil {
		return nil, fmt.Errorf("%s: to write %s images in place, qemu-nbd must be installed (package qemu-utils): %w", path, f, fault.ErrUnsupported)
	}
	driver := map[image.Format]string{
		image.Qcow2: "qcow2",
		// Without this word QEMU takes the size from the drive geometry.
		image.VHD:  "vpc,force_size_calc=current_size",
		image.VHDX: "vhdx",
		image.VMDK: "vmdk",
	}[f]
	if driver == "" {
		return nil, fmt.Errorf("%s: %s images can't be written in place: %w", path, f, fault.ErrUnsupported)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "backstay") // private, and a short name for the socket
	if err != nil {
		return nil, err
	}
	sock := filepath.Join(dir, "nbd")
	d := &qemuDevice{stderr: &bytes.Buffer{}, ended: make(chan error, 1), dir: dir}
	d.cmd = exec.Command(program, "--socket="+sock, fmt.Sprintf("--shared=%d", qemuConnections), "--discard=unmap", "--image-opts",
		"driver="+driver+",discard=unmap,file.driver=file,file.filename="+strings.ReplaceAll(abs, ",", ",,"))
	d.cmd.Stderr = d.stderr
	if err := d.cmd.Start(); err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("qemu-nbd: %w", err)
	}
	go func() { d.ended <- d.cmd.Wait() }()
	for {
		d.Client, err = nbd.Dial(ctx, nbd.Target{Network: "unix", Address: sock, Connections: qemuConnections, MetaContexts: []string{allocation}})
		if err == nil {
			return d, nil
		}
		select {
		case <-d.ended:
			os.RemoveAll(dir)
			return nil, d.refusal(path)
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), d.kill())
		case <-time.After(20 * time.Millisecond): // it has no way to say that it listens
		}
		if errors.Is(err, os.ErrNotExist) || refusedConnection(err) {
			continue
		}
		// It listens before it opens the image, and hangs up if it can't.
		select {
		case <-d.ended:
			os.RemoveAll(dir)
			return nil, d.refusal(path)
		case <-time.After(time.Second):
			d.kill()
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
}

// refusal is what qemu-nbd said before it gave up.
func (d *qemuDevice) refusal(path string) error {
	said := strings.TrimSpace(d.stderr.String())
	if strings.Contains(said, "lock") {
		return fmt.Errorf("%s is in use by another program: %w (qemu-nbd says %q)", path, fault.ErrLocked, said)
	}
	return fmt.Errorf("%s: qemu-nbd can't open it: %q", path, said)
}

func (d *qemuDevice) kill() error {
	d.cmd.Process.Kill()
	<-d.ended
	return os.RemoveAll(d.dir)
}

func (d *qemuDevice) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	var set extent.Set
	for s, err := range d.BlockStatus(ctx, allocation, within) {
		if errors.Is(err, fault.ErrUnsupported) {
			return extent.NewSet(within), nil
		}
		if err != nil {
			return set, err
		}
		if s.Flags&nbd.StateZero == 0 {
			set.Add(s.Extent)
		}
	}
	return set, nil
}

func (d *qemuDevice) Zero(ctx context.Context, e extent.Extent) error {
	return d.WriteZeroes(ctx, e, true)
}

// Close waits until qemu-nbd has written the image's metadata and is gone.
func (d *qemuDevice) Close() error {
	d.Client.Close()
	defer os.RemoveAll(d.dir)
	select {
	case err := <-d.ended:
		if err != nil {
			return fmt.Errorf("qemu-nbd: %w: %q", err, strings.TrimSpace(d.stderr.String()))
		}
		return nil
	case <-time.After(2 * time.Minute):
		return errors.Join(errors.New("qemu-nbd does not end"), d.kill())
	}
}
