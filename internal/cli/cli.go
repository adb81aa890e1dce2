// Package cli is the command line: one file per command with its options,
// flags and run, and the one place where errors become exit codes and hints.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/backstay/backstay/internal/hypervisor/kvm"
)

// Version is the release, set by the linker: -X …/internal/cli.Version=1.2.
var Version = "0.1-dev"

// An app is one run of the program: where its words go and what the global
// flags said. Commands are methods that add themselves to its root.
type app struct {
	stdin  *os.File
	stdout io.Writer // results
	stderr io.Writer // talk, progress, errors
	getenv func(string) string

	repoURL    string
	cred       credentials
	tokenFiles []string
	stateDir   string
	cacheDir   string
	asOf       string // empty for now
	json       bool
	quiet      bool
	verbose    bool

	// code is the exit code of a command that ended without an error: 0, or 4
	// for done with warnings.
	code int
}

// Main runs one command line and returns its exit code.
func Main(args []string) int {
	if len(args) == 1 && args[0] == kvm.WatchdogArg {
		return kvm.WatchdogMain(os.Stdin, os.Stdout)
	}
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second ^C ends the program at once: what the first one started to
	// clean up is then left to the journal.
	context.AfterFunc(ctx, stop)
	return a.run(ctx, args)
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return a.code
	}
	if ctx.Err() != nil && !errors.Is(err, errPartial) {
		err = fmt.Errorf("interrupted: %w", err)
	}
	code := exitCode(err)
	if !errors.Is(err, errPartial) {
		fmt.Fprintf(a.stderr, "backstay: %v\n", err)
	}
	for _, h := range hints(err, cmd) {
		fmt.Fprintf(a.stderr, "hint: %s\n", h)
	}
	return code
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "backstay",
		Short: "back up virtual machines at image level and bring them back",
		Long: `Backstay backs up virtual machines at image level into one deduplicated,
encrypted repository, and brings them back as bootable disks in any format.

Every restore point is a full: it restores alone, whatever was read to make it.`,
		Example: `  backstay repo init --repo /srv/backup
  backstay backup kvm:///system/web01 --repo /srv/backup
  backstay restore web01 --to web01.qcow2 --repo /srv/backup`,
		Version:       Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE:          showHelp,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if a.repoURL == "" {
				a.repoURL = a.getenv("BACKSTAY_REPO")
			}
			return nil
		},
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&a.repoURL, "repo", "", "repository: a path, s3://endpoint/bucket/prefix, azblob://account/container/prefix, sftp://user@host/path or backstay://host:port/name (or set BACKSTAY_REPO)")
	a.cred.addFlags(f, "")
	a.cred.addIdentityFlag(f, "")
	f.StringArrayVar(&a.tokenFiles, "token-file", nil, "file with the token for a backstay:// repository (or BACKSTAY_TOKEN_FILE, BACKSTAY_TOKEN); may be repeated")
	f.StringVar(&a.stateDir, "state-dir", defaultStateDir(), "where the journal of what was made on hosts is kept")
	f.StringVar(&a.cacheDir, "cache-dir", defaultCacheDir(), "where copies of the index of a repository far away are kept, up to 16 GiB; safe to delete")
	f.BoolVar(&a.json, "json", false, "print results as JSON, one object per line in lists")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no progress bars and no talk, only results and errors")
	f.BoolVarP(&a.verbose, "verbose", "v", false, "say on stderr what is done and why")
	root.AddCommand(a.repoCmd(), a.vmCmd(), a.backupCmd(), a.pointCmd(), a.restoreCmd(), a.imageCmd(), a.hypervCmd(), a.demoCmd())
	asksForArguments(root)
	return root
}

// asksForArguments makes every complaint about arguments a usage error, and
// every noun without a verb show its help.
func asksForArguments(cmd *cobra.Command) {
	if args := cmd.Args; args != nil {
		cmd.Args = func(c *cobra.Command, v []string) error {
			if err := args(c, v); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	for _, c := range cmd.Commands() {
		asksForArguments(c)
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.HasAvailableSubCommands() {
		msg := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			msg += fmt.Sprintf("; did you mean %q?", s[0])
		}
		return errors.New(msg)
	}
	return fmt.Errorf("%q takes no arguments, got %q", cmd.CommandPath(), strings.Join(args, " "))
}

func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// noun is a command that only groups verbs.
func noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: noArgs, RunE: showHelp, SuggestionsMinimumDistance: 2}
	cmd.AddCommand(verbs...)
	return cmd
}

func (a *app) log() *slog.Logger {
	level := slog.LevelWarn
	if a.verbose {
		level = slog.LevelDebug
	}
	if a.quiet {
		level = slog.LevelError
	}
	return slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
}

// say talks to people, on stderr.
func (a *app) say(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.stderr, format+"\n", args...)
	}
}

// onTerminal says whether stderr is a terminal that can show a bar.
func (a *app) onTerminal() bool {
	f, ok := a.stderr.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func defaultStateDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/backstay"
	}
	if dir, err := os.UserConfigDir(); err == nil {
		return dir + string(os.PathSeparator) + "backstay"
	}
	return ".backstay"
}

func defaultCacheDir() string {
	if os.Geteuid() == 0 {
		return "/var/cache/backstay"
	}
	if dir, err := os.UserCacheDir(); err == nil {
		return filepath.Join(dir, "backstay")
	}
	return ""
}
