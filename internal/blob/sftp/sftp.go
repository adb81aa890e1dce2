// Package sftp is a store in a directory that an SSH server serves: blob/file
// over the SFTP protocol.
//
// The connection is made by the ssh program, so that keys, agents, jump hosts
// and known hosts are those that the administrator has set up already. The
// server must know OpenSSH's extensions fsync, hardlink and posix-rename:
// without them none of the promises of a store could be kept.
package sftp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os/exec"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pkg/sftp"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// A Location is a directory on a server.
type Location struct {
	User string // empty for what ssh's configuration says
	Host string
	Port int // 0 for what ssh's configuration says
	Path string
}

// ParseURL reads "sftp://user@host:port/path". The path is absolute; "/~/" at
// its beginning is the user's home directory. Passwords are refused.
func ParseURL(s string) (Location, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Location{}, errors.New("the SFTP URL cannot be parsed: want sftp://user@host:port/path")
	}
	l := Location{Host: u.Hostname(), Path: path.Clean(u.Path)}
	if u.User != nil {
		if _, ok := u.User.Password(); ok {
			return Location{}, errors.New("an SFTP URL holds no password: let ssh have a key")
		}
		l.User = u.User.Username()
	}
	if p := u.Port(); p != "" {
		if l.Port, err = strconv.Atoi(p); err != nil || l.Port < 1 || l.Port > 65535 {
			return Location{}, fmt.Errorf("port %q is none", p)
		}
	}
	switch {
	case u.Scheme != "sftp":
		return Location{}, fmt.Errorf("%s:// is no SFTP URL", u.Scheme)
	case l.Host == "" || u.Path == "" || l.Path == "/" || u.RawQuery != "" || u.Fragment != "":
		return Location{}, fmt.Errorf("%q names no directory: want sftp://user@host:port/path", s)
	case strings.HasPrefix(l.Host, "-") || strings.HasPrefix(l.User, "-"):
		return Location{}, fmt.Errorf("%q: a name may not begin with \"-\"", s) // ssh would take it for an option
	}
	if home, ok := strings.CutPrefix(l.Path, "/~/"); ok {
		l.Path = home
	}
	return l, nil
}

// String is the URL of l.
func (l Location) String() string {
	u := url.URL{Scheme: "sftp", Host: l.Host, Path: l.Path}
	if strings.Contains(l.Host, ":") {
		u.Host = "[" + l.Host + "]"
	}
	if l.Port != 0 {
		u.Host += ":" + strconv.Itoa(l.Port)
	}
	if l.User != "" {
		u.User = url.User(l.User)
	}
	if !strings.HasPrefix(l.Path, "/") {
		u.Path = "/~/" + l.Path
	}
	return u.String()
}

// command is the ssh that connects to l. It asks nobody anything.
func (l Location) command(program string) *exec.Cmd {
	args := []string{"-oBatchMode=yes", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"}
	if l.Port != 0 {
		args = append(args, "-p", strconv.Itoa(l.Port))
	}
	if l.User != "" {
		args = append(args, "-l", l.User)
	}
	return exec.Command(program, append(args, "-s", "--", l.Host, "sftp")...)
}

// Open opens the store at l, which must exist; Create makes its directory.
// Errors: fault.ErrNotFound; fault.ErrDenied where the server lets us not in or
// is not who it was; fault.ErrUnsupported for a server without the extensions.
func Open(ctx context.Context, l Location) (blob.Store, error) { return open(ctx, l, "ssh", false) }

// Create is Open, and makes the directory, but not its parents.
func Create(ctx context.Context, l Location) (blob.Store, error) { return open(ctx, l, "ssh", true) }

func open(ctx context.Context, l Location, program string, create bool) (blob.Store, error) {
	r := &remote{root: l.Path, dial: func() (*sftp.Client, error) { return dial(ctx, l, program) }}
	c, err := r.use()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l, err)
	}
	if create {
		if err := c.Mkdir(l.Path); err != nil {
			if st, statErr := c.Stat(l.Path); statErr != nil || !st.IsDir() {
				r.Close()
				return nil, fmt.Errorf("%s: make the directory: %w", l, full(c, path.Dir(l.Path), err))
			}
		}
	}
	st, err := c.Stat(l.Path)
	if err == nil && !st.IsDir() {
		err = fs.ErrNotExist
	}
	if err != nil {
		r.Close()
		if errors.Is(err, fs.ErrNotExist) {
			err = fault.ErrNotFound
		}
		return nil, fmt.Errorf("%s: %w", l, err)
	}
	files := file.OpenFS(r, l.String())
	files.KeepReserve()
	return store{files}, nil
}

// A store is no blob.Locker: there is nothing to hold a lock with.
type store struct{ blob.Store }

// ReadShape implements blob.ReadShaper. One connection carries all reads, and
// each of them keeps many packets on their way already.
func (store) ReadShape() blob.ReadShape {
	return blob.ReadShape{Gap: 1 << 20, Run: 8 << 20, InFlight: 16, Memory: 128 << 20}
}

// dial starts ssh and speaks SFTP with what it reaches.
func dial(ctx context.Context, l Location, program string) (*sftp.Client, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	cmd := l.command(program)
	apart(cmd)
	said := &tail{}
	cmd.Stderr = said
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("ssh: %w", err)
	}
	// Somebody who gives up waiting ends the process, and with it the wait.
	giveUp := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	c, err := sftp.NewClientPipe(out, in, sftp.UseConcurrentWrites(true))
	if err != nil {
		in.Close()
		if !waitFor(cmd, 5*time.Second) {
			cmd.Process.Kill()
		}
		giveUp()
		return nil, said.explain(err)
	}
	giveUp()
	go func() {
		c.Wait()
		in.Close()
		cmd.Wait()
	}()
	for _, e := range []string{"fsync@openssh.com", "hardlink@openssh.com", "posix-rename@openssh.com"} {
		if _, ok := c.HasExtension(e); !ok {
			c.Close()
			return nil, fmt.Errorf("the SFTP server lacks %s, without which nothing it stores is sure to last: %w", e, fault.ErrUnsupported)
		}
	}
	return c, nil
}

// waitFor says whether the process ended in time.
func waitFor(cmd *exec.Cmd, limit time.Duration) bool {
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// A tail keeps the end of what ssh says.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if cut := len(t.buf) - 2000; cut > 0 {
		t.buf = bytes.Clone(t.buf[cut:])
	}
	return len(p), nil
}

// explain says why there is no connection, in ssh's words.
func (t *tail) explain(err error) error {
	t.mu.Lock()
	words := strings.TrimSpace(string(t.buf))
	t.mu.Unlock()
	if words == "" {
		return fmt.Errorf("ssh: %w", err)
	}
	// ssh has one exit status for everything.
	for _, s := range []string{"Permission denied", "Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED"} {
		if strings.Contains(words, s) {
			return fmt.Errorf("ssh: %s: %w", words, fault.ErrDenied)
		}
	}
	return fmt.Errorf("ssh: %s: %w", words, err)
}
