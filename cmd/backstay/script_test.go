package main_test

import (
	"errors"
	"fmt"
	"go/build"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backstay/backstay/internal/cli"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"backstay": func() {
			args := os.Args[1:]
			if len(args) > 0 && args[0] != kvm.WatchdogArg && args[0] != "help" && !strings.HasPrefix(args[0], "__complete") {
				// Each script has its own journal, and none the machine's.
				args = append([]string{"--state-dir", filepath.Join(os.Getenv("HOME"), "state")}, args...)
			}
			os.Exit(cli.Main(args))
		},
	})
}

// The product's stories, one file each. Programs that nobody here wrote are
// the judges where a script calls them.
func TestScripts(t *testing.T) {
	var servers sync.Map // of *exec.Cmd, by the script's directory
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("BACKSTAY_PASSWORD", "correct horse")
			e.Setenv("BACKSTAY_REPO", e.WorkDir+"/repo")
			e.Setenv("HOME", e.WorkDir)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			if cond == "samba" {
				return hasSamba(), nil
			}
			if cond == "versitygw" {
				_, inPath := exec.LookPath("versitygw")
				_, installed := os.Stat(filepath.Join(build.Default.GOPATH, "bin", "versitygw"))
				return os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" || inPath == nil || installed == nil, nil
			}
			if cond == "curl" {
				_, err := exec.LookPath("curl")
				return os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" || err == nil, nil
			}
			if cond == "sftp-server" {
				_, err := os.Stat("/usr/lib/openssh/sftp-server")
				return os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "" || err == nil, nil
			}
			return false, errors.New("unknown condition " + cond)
		},
		Cmds: with(hypervCmds(), map[string]func(*testscript.TestScript, bool, []string){
			// exits CODE PROGRAM ARG…: runs it and wants exactly that exit code.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				err = ts.Exec(args[1], args[2:]...)
				got := 0
				var ee *exec.ExitError
				if errors.As(err, &ee) {
					got = ee.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if got != want {
					ts.Fatalf("exit code %d, want %d", got, want)
				}
			},
			// bytes FILE OFFSET TEXT: overwrites bytes in a file, which grows if needed.
			"bytes": func(ts *testscript.TestScript, neg bool, args []string) {
				f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR|os.O_CREATE, 0o644)
				ts.Check(err)
				defer f.Close()
				off, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				_, err = f.WriteAt([]byte(args[2]), off)
				ts.Check(err)
			},
			// noise FILE BYTES: makes a file that neither shrinks nor has two equal parts.
			"noise": func(ts *testscript.TestScript, neg bool, args []string) {
				n, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				f, err := os.Create(ts.MkAbs(args[0]))
				ts.Check(err)
				defer f.Close()
				_, err = io.CopyN(f, rand.NewChaCha8([32]byte{}), n)
				ts.Check(err)
			},
			// until N GLOB: waits until GLOB names at least N files.
			"until": func(ts *testscript.TestScript, neg bool, args []string) {
				n, err := strconv.Atoi(args[0])
				ts.Check(err)
				for began := time.Now(); ; time.Sleep(2 * time.Millisecond) {
					found, err := filepath.Glob(ts.MkAbs(args[1]))
					ts.Check(err)
					if len(found) >= n {
						return
					}
					if time.Since(began) > 5*time.Minute {
						ts.Fatalf("%s names %d files", args[1], len(found))
					}
				}
			},
			// flip GLOB OFFSET: turns one bit of the one file that GLOB names; a
			// negative offset counts from its end.
			"flip": func(ts *testscript.TestScript, neg bool, args []string) {
				path := one(ts, args[0])
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				ts.Check(err)
				defer f.Close()
				off, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				if off < 0 {
					st, err := f.Stat()
					ts.Check(err)
					off += st.Size()
				}
				var b [1]byte
				_, err = f.ReadAt(b[:], off)
				ts.Check(err)
				b[0] ^= 0x10
				_, err = f.WriteAt(b[:], off)
				ts.Check(err)
			},
			// cut GLOB BYTES: makes the one file that GLOB names shorter by so much.
			"cut": func(ts *testscript.TestScript, neg bool, args []string) {
				path := one(ts, args[0])
				n, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				st, err := os.Stat(path)
				ts.Check(err)
				ts.Check(os.Truncate(path, st.Size()-n))
			},
			// tmpfs DIR SIZE: mounts a small file system until the script ends. With
			// ! it becomes read-only.
			"tmpfs": func(ts *testscript.TestScript, neg bool, args []string) {
				dir := ts.MkAbs(args[0])
				if neg {
					ts.Check(run("mount", "-o", "remount,ro", dir))
					return
				}
				ts.Check(os.MkdirAll(dir, 0o755))
				ts.Check(run("mount", "-t", "tmpfs", "-o", "size="+args[1], "backstay-test", dir))
				ts.Defer(func() { run("umount", "-l", dir) })
			},
			// s3 DIR: serves the buckets in DIR until the script ends; its address
			// and credentials are in the environment.
			"s3": func(ts *testscript.TestScript, neg bool, args []string) {
				exe, err := exec.LookPath("versitygw")
				if err != nil {
					exe = filepath.Join(build.Default.GOPATH, "bin", "versitygw")
				}
				l, err := net.Listen("tcp", "127.0.0.1:0")
				ts.Check(err)
				at := l.Addr().String()
				ts.Check(l.Close())
				cmd := exec.Command(exe, "--port", at, "--quiet", "posix", ts.MkAbs(args[0]))
				cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY=script", "ROOT_SECRET_KEY=script-secret")
				ts.Check(cmd.Start())
				ts.Defer(func() {
					cmd.Process.Kill()
					cmd.Wait()
				})
				for name, value := range map[string]string{"S3": at, "AWS_ACCESS_KEY_ID": "script", "AWS_SECRET_ACCESS_KEY": "script-secret", "AWS_REGION": "us-east-1"} {
					ts.Setenv(name, value)
				}
				for range 6000 {
					if c, err := net.Dial("tcp", at); err == nil {
						c.Close()
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
				ts.Fatalf("versitygw does not answer")
			},
			// serve ARG…: runs "backstay repo serve ARG…" on a free port until the
			// script or "unserve" ends it; its address is in $SERVER, and what it
			// says goes to the file server.log.
			"serve": func(ts *testscript.TestScript, neg bool, args []string) {
				at := ts.Getenv("SERVER")
				if at == "" {
					l, err := net.Listen("tcp", "127.0.0.1:0")
					ts.Check(err)
					at = l.Addr().String()
					ts.Check(l.Close())
				}
				ts.Setenv("SERVER", at)
				out, err := os.OpenFile(ts.MkAbs("server.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
				ts.Check(err)
				defer out.Close()
				cmd := exec.Command(program(ts, "backstay"), append([]string{"repo", "serve", "--listen", at}, args...)...)
				cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), out, out
				ts.Check(cmd.Start())
				servers.Store(ts.MkAbs("."), cmd)
				ts.Defer(func() {
					cmd.Process.Kill()
					cmd.Wait()
				})
				for range 6000 {
					if c, err := net.Dial("tcp", at); err == nil {
						c.Close()
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
				log, _ := os.ReadFile(out.Name())
				ts.Fatalf("the server does not answer: %s", log)
			},
			// unserve SIGNAL: ends the server; TERM must end it well.
			"unserve": func(ts *testscript.TestScript, neg bool, args []string) {
				v, ok := servers.LoadAndDelete(ts.MkAbs("."))
				if !ok {
					ts.Fatalf("no server runs")
				}
				server := v.(*exec.Cmd)
				sig := map[string]os.Signal{"TERM": syscall.SIGTERM, "KILL": os.Kill}[args[0]]
				ts.Check(server.Process.Signal(sig))
				if err := server.Wait(); err != nil && sig != os.Kill {
					log, _ := os.ReadFile(ts.MkAbs("server.log"))
					ts.Fatalf("the server ended with %v: %s", err, log)
				}
			},
			// first FILE: sets POINT to the first VM/ID that a list in FILE names.
			"first": func(ts *testscript.TestScript, neg bool, args []string) {
				for _, f := range strings.Fields(ts.ReadFile(args[0])) {
					if strings.Contains(f, "/") {
						ts.Setenv("POINT", f)
						return
					}
				}
				ts.Fatalf("%s names no point", args[0])
			},
			// size FILE BYTES: makes or cuts a file to that length.
			"size": func(ts *testscript.TestScript, neg bool, args []string) {
				n, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR|os.O_CREATE, 0o644)
				ts.Check(err)
				ts.Check(f.Truncate(n))
				ts.Check(f.Close())
			},
		}),
	})
}

// program finds what a script would run.
func program(ts *testscript.TestScript, name string) string {
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if path := filepath.Join(dir, name); exec.Command(path).Err == nil {
			return path
		}
	}
	ts.Fatalf("%s is nowhere in PATH", name)
	return ""
}

// one gives the one file that a pattern names.
func one(ts *testscript.TestScript, glob string) string {
	found, err := filepath.Glob(ts.MkAbs(glob))
	ts.Check(err)
	if len(found) != 1 {
		ts.Fatalf("%s names %d files, want one", glob, len(found))
	}
	return found[0]
}

func run(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
