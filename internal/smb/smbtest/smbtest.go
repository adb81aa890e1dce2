// Package smbtest runs a Samba of its own on loopback, with encryption and
// signing mandatory, for tests and measurements of package smb.
package smbtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What every Server is asked for.
const (
	User     = "root" // Samba wants the system to know its users
	Password = "S3cret of the lab"
	Share    = "vm"
)

// ErrMissing says that Samba or root is not there.
var ErrMissing = errors.New("needs Samba and root")

// Options say what a Server does otherwise.
type Options struct {
	Dir    string // of the share; empty for a new one
	Global string // further lines of smb.conf
	// Plain leaves encryption to the client and keeps only signing.
	Plain bool
}

// A Server is one smbd that belongs to us. It is not safe for concurrent use.
type Server struct {
	Port int
	Dir  string // what the share holds

	work string
	cmd  *exec.Cmd
	done chan struct{}
}

// Start starts a server; Stop ends it and removes what was made for it.
func Start(ctx context.Context, o Options) (*Server, error) {
	if path := os.Getenv("PATH"); !strings.HasSuffix(path, ":/usr/sbin:/sbin") {
		os.Setenv("PATH", path+":/usr/sbin:/sbin") // where Debian has smbd
	}
	for _, program := range []string{"smbd", "smbpasswd"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%s: %w", program, ErrMissing)
		}
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("user %d: %w", os.Geteuid(), ErrMissing)
	}
	// Sockets lie in there, whose paths have room for about 100 bytes.
	work, err := os.MkdirTemp("", "smb")
	if err != nil {
		return nil, err
	}
	s := &Server{work: work, Dir: o.Dir}
	if err := s.prepare(ctx, o); err != nil {
		s.Stop()
		return nil, err
	}
	if err := s.Run(ctx); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

func (s *Server) prepare(ctx context.Context, o Options) error {
	if s.Dir == "" {
		s.Dir = filepath.Join(s.work, "vm")
	}
	for _, dir := range []string{s.Dir, s.path("private"), s.path("run")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// Whoever takes the port before smbd does makes it fail to start, which is
	// tried again.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.Port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	encrypt := "required"
	if o.Plain {
		encrypt = "off"
	}
	conf := fmt.Sprintf(`[global]
server role = standalone server
workgroup = LAB
netbios name = LAB
disable netbios = yes
interfaces = 127.0.0.1/8
bind interfaces only = yes
smb ports = %d
server min protocol = SMB3_00
smb encrypt = %s
server signing = mandatory
map to guest = never
passdb backend = tdbsam:%[3]s/private/passdb.tdb
private dir = %[3]s/private
lock directory = %[3]s/run
state directory = %[3]s/run
cache directory = %[3]s/run
pid directory = %[3]s/run
ncalrpc dir = %[3]s/run/ncalrpc
log file = %[3]s/log
log level = 1
load printers = no
disable spoolss = yes
%s

[%s]
path = %s
read only = no
`, s.Port, encrypt, s.work, o.Global, Share, s.Dir)
	if err := os.WriteFile(s.path("smb.conf"), []byte(conf), 0o600); err != nil {
		return err
	}
	add := exec.CommandContext(ctx, "smbpasswd", "-c", s.path("smb.conf"), "-s", "-a", User)
	add.Stdin = strings.NewReader(Password + "\n" + Password + "\n")
	if out, err := add.CombinedOutput(); err != nil {
		return fmt.Errorf("smbpasswd: %w\n%s", err, out)
	}
	return nil
}

func (s *Server) path(name string) string { return filepath.Join(s.work, name) }

// Run starts smbd again after Kill and waits until it takes connections.
func (s *Server) Run(ctx context.Context) error {
	s.cmd = exec.Command("smbd", "--foreground", "--no-process-group", "--configfile="+s.path("smb.conf"))
	s.cmd.SysProcAttr = ownGroup()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { cmd.Wait(); close(done) }(s.cmd, s.done)
	for {
		conn, err := net.Dial("tcp", s.Addr())
		if err == nil {
			conn.Close()
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("smbd ended: %s", s.Log())
		case <-ctx.Done():
			return fmt.Errorf("smbd does not listen: %w: %s", ctx.Err(), s.Log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Addr is where it listens.
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.Port) }

// Config is the path of its smb.conf.
func (s *Server) Config() string { return s.path("smb.conf") }

// Log is the end of what smbd wrote.
func (s *Server) Log() string {
	b, _ := os.ReadFile(s.path("log"))
	return string(b[max(0, len(b)-4096):])
}

// Kill ends smbd and all its children at once, as a power cut would.
func (s *Server) Kill() {
	if s.cmd == nil {
		return
	}
	killGroup(s.cmd.Process.Pid)
	<-s.done
	s.cmd = nil
}

// Stop ends the server and removes its directory; a share that was given
// stays.
func (s *Server) Stop() error {
	s.Kill()
	err := os.RemoveAll(s.work)
	// A child that was just killed may still have made a file.
	for range 100 {
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
		err = os.RemoveAll(s.work)
	}
	return err
}

// Run starts a server for the time of a test. Where there is no Samba the test
// is skipped, unless tests may not be.
func Run(t testing.TB, o Options) *Server {
	t.Helper()
	s := start(t, o)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Shared is Run with a server that stays in *s for the tests that follow; the
// package's TestMain stops it. A test that kills it runs it again.
func Shared(t testing.TB, s **Server, o Options) *Server {
	t.Helper()
	if *s == nil {
		*s = start(t, o)
	}
	return *s
}

func start(t testing.TB, o Options) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for tries := 1; ; tries++ {
		s, err := Start(ctx, o)
		switch {
		case err == nil:
			return s
		case errors.Is(err, ErrMissing) && os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "1":
			t.Skip(err)
		case errors.Is(err, ErrMissing) || tries == 3:
			t.Fatal(err)
		}
	}
}
