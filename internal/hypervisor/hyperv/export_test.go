package hyperv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// ReachHost has d, and the Drivers of other nodes, reach a simulated host's files
// where they lie.
func ReachHost(d *Driver, h *host.Host) { reach(d, simFiles{h}) }

// ReachStandIn has them find what a replay needs: folder can be written to, and
// a VM's definition is any of those files; all lies in dir.
func ReachStandIn(d *Driver, dir, folder string, definitions []string) {
	reach(d, &standIn{dir: dir, folder: folder, definitions: definitions, made: map[string]bool{}})
}

// reach has d wait less, too: a replay that ends early waits in vain.
func reach(d *Driver, f files) {
	set := func(d *Driver) { d.files, d.poll, d.patience = f, 2*time.Millisecond, 50*time.Millisecond }
	set(d)
	dial := d.cluster.dial
	d.cluster.dial = func(node string) (*Driver, error) {
		n, err := dial(node)
		if err == nil {
			set(n)
		}
		return n, err
	}
}

// A standIn is a host's files where there is no host.
type standIn struct {
	dir, folder string
	definitions []string
	made        map[string]bool // folders
}

func (s *standIn) local(name string) string {
	return filepath.Join(s.dir, fmt.Sprintf("%x", sha256.Sum256([]byte(strings.ToLower(name)))))
}

func (s *standIn) open(_ context.Context, name string) (image.File, error) {
	return image.OpenFile(s.local(name))
}

// list finds the VM's definition anywhere but in a folder that was made, or is
// about to be.
func (s *standIn) list(_ context.Context, folder string) ([]string, error) {
	at := strings.LastIndexByte(folder, '\\')
	switch above := folder[:max(at, 0)]; {
	case s.made[strings.ToLower(folder)]:
		return nil, nil
	case s.made[strings.ToLower(above)], strings.EqualFold(above, s.folder), len(s.definitions) == 0:
		return nil, fault.ErrNotFound
	}
	for _, name := range s.definitions {
		if err := os.WriteFile(s.local(folder+`\`+name), []byte("a definition"), 0o600); err != nil {
			return nil, err
		}
	}
	return s.definitions, nil
}

func (s *standIn) size(_ context.Context, name string) (int64, error) { return 0, fault.ErrNotFound }

func (s *standIn) space(context.Context, string) (int64, int64, error) {
	return 100 << 30, 200 << 30, nil
}

func (s *standIn) share(name string) (string, error) {
	if s.folder == "" || !strings.HasPrefix(strings.ToLower(name)+`\`, strings.ToLower(s.folder)+`\`) {
		return "", image.ErrNotAllowed
	}
	return "share", nil
}

func (s *standIn) close() error { return nil }

func (s *standIn) create(_ context.Context, name string) (image.Output, error) {
	out, err := os.OpenFile(s.local(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, classified(err)
	}
	return out, nil
}

func (s *standIn) mkdir(_ context.Context, name string) error {
	s.made[strings.ToLower(name)] = true
	return nil
}

func (s *standIn) remove(_ context.Context, name string) error {
	if s.made[strings.ToLower(name)] {
		delete(s.made, strings.ToLower(name))
		return nil
	}
	return classified(os.Remove(s.local(name)))
}

func (s *standIn) rename(context.Context, string, string) error {
	return errors.New("nothing is renamed here")
}

func (s *standIn) room(context.Context, string, int64) error { return nil }
