package main_test

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backstay/backstay/internal/cli"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"backstay": func() { os.Exit(cli.Main(os.Args[1:])) },
	})
}

// The product's stories, one file each. Programs that nobody here wrote are
// the judges where a script calls them.
func TestScripts(t *testing.T) {
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
			return false, errors.New("unknown condition " + cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
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
			// size FILE BYTES: makes or cuts a file to that length.
			"size": func(ts *testscript.TestScript, neg bool, args []string) {
				n, err := strconv.ParseInt(args[1], 10, 64)
				ts.Check(err)
				f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR|os.O_CREATE, 0o644)
				ts.Check(err)
				ts.Check(f.Truncate(n))
				ts.Check(f.Close())
			},
		},
	})
}
