package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/reposerver"
	"github.com/backstay/backstay/internal/retention"
)

func (a *app) repoServeCmd() *cobra.Command {
	var o reposerver.Options
	var listen, immutable string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "let other machines back up into this one, without being able to delete",
		Long: `Serve the repositories in a directory to other machines, which reach them as
backstay://host:port/name, over TLS, each with a token.

A client whose token has the role "backup" reads, and stores what is new. It can
delete or overwrite nothing but the note of a session that it began itself, so
whoever takes over such a client cannot take away what it backed up before. The
role "restore" only reads. The role "admin" may do everything, vacuum and prune
included; better have no such token, and run these on the server itself, as the
user that the server runs as: backstay repo vacuum --repo DIR/NAME.

--immutable-for 14d refuses everybody, also an admin, over the network, to
overwrite what restore points are made of, or to delete it before it is that
old; what is older and deleted is set aside for as long again, in .aside of the
repository's directory. The time is the server's own: it counts while the server
runs, and setting the machine's clock does not move it. It stays in force when
the server is started without the flag.

--quota 500G bounds what backup clients may store in each repository. A backup
that would need more fails, and no restore point of it exists; an admin's token,
and the server itself, may still prune and vacuum. It is said at each start.

The server makes its key when it first starts. Every token holds the key's
fingerprint, so clients talk to this server alone. What is refused is written
to stderr, one line for each request. SIGTERM lets requests under way end.`,
		Example: `  backstay repo serve --dir /srv/backups --listen :9443 --immutable-for 14d
  backstay repo serve token add web01 --role backup --repository web --dir /srv/backups > web01.token
  backstay repo init --repo backstay://nas.example.com/web --token-file web01.token`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.ImmutableFor = -1
			if cmd.Flags().Changed("immutable-for") {
				d, err := parsePeriod(immutable)
				if err != nil {
					return usage("--immutable-for: %w", err)
				}
				o.ImmutableFor = d
			}
			return a.repoServe(cmd.Context(), o, listen)
		},
	}
	cmd.PersistentFlags().StringVar(&o.Dir, "dir", "", "directory that holds the repositories")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:"+remote.DefaultPort, "address to listen on; :9443 for all of this machine's")
	cmd.Flags().StringVar(&immutable, "immutable-for", "", "how long nobody may delete or overwrite anything, such as 14d")
	cmd.Flags().Var((*sizeFlag)(&o.Quota), "quota", "how much backup clients may store in each repository, such as 500G; 0 for no bound")
	cmd.Flags().BoolVar(&o.Shorten, "shorten", false, "accept a shorter --immutable-for than was in force")
	cmd.AddCommand(noun("token", "who may use a repository server, and for what",
		a.tokenAddCmd(&o.Dir), a.tokenListCmd(&o.Dir), a.tokenRemoveCmd(&o.Dir)))
	return cmd
}

// parsePeriod reads an age as so many hours: a month has 31 days here and a year
// 366, since what is held is rather held too long. "0" is none.
func parsePeriod(s string) (time.Duration, error) {
	if s == "0" {
		return 0, nil
	}
	age, err := retention.ParseAge(s)
	if err != nil {
		return 0, err
	}
	hours := int64(age.Hours) + 24*(int64(age.Days)+31*int64(age.Months)+366*int64(age.Years))
	const most = 100 * 366 * 24
	if hours > most {
		return 0, fmt.Errorf("%q is more than a hundred years", s)
	}
	return time.Duration(hours) * time.Hour, nil
}

func repositories(n int) string {
	if n == 1 {
		return "1 repository"
	}
	return fmt.Sprintf("%d repositories", n)
}

func needDir(dir string) error {
	if dir == "" {
		return usage("--dir is missing: which directory holds the repositories?")
	}
	return nil
}

func (a *app) repoServe(ctx context.Context, o reposerver.Options, listen string) error {
	if err := needDir(o.Dir); err != nil {
		return err
	}
	level := slog.LevelInfo
	switch {
	case a.verbose:
		level = slog.LevelDebug
	case a.quiet:
		level = slog.LevelWarn
	}
	o.Log = slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
	srv, err := reposerver.Open(ctx, o)
	if err != nil {
		var shorter *reposerver.ShorterError
		switch {
		case errors.As(err, &shorter):
			return coded{code: exitRefused, err: err, hint: "to break that promise, say --shorten as well"}
		case errors.Is(err, fault.ErrLocked):
			return withHint(err, "one server serves all repositories in a directory; look for one that runs")
		}
		return fmt.Errorf("serve %s: %w", o.Dir, err)
	}
	defer srv.Close()
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return withHint(fmt.Errorf("listen: %w", err), "say an address of this machine with --listen, such as :9443")
	}
	repos, err := srv.Repositories()
	if err != nil {
		return err
	}
	if a.json {
		err = a.printJSON(map[string]any{"listen": l.Addr().String(), "dir": o.Dir, "fingerprint": srv.Pin().String(),
			"immutable_seconds": int64(srv.ImmutableFor() / time.Second), "repositories": append([]string{}, repos...)})
	} else {
		held := "objects are not immutable"
		if srv.ImmutableFor() > 0 {
			held = fmt.Sprintf("objects are immutable for %s", srv.ImmutableFor())
		}
		_, err = fmt.Fprintf(a.stdout, "serving %s on %s, fingerprint %s, %s, %s\n", o.Dir, l.Addr(), srv.Pin(), repositories(len(repos)), held)
	}
	if err != nil {
		return err
	}
	return srv.Serve(ctx, l)
}

func (a *app) tokenAddCmd(dir *string) *cobra.Command {
	var role string
	var repos []string
	var all bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "let a client in, and print its token, once",
		Long: `Let a client in. Its token is printed, once: the server keeps only a hash. Bring
it to the client in a file that only its user can read, and name that with
--token-file there.

A running server takes the token at once. To change a token, remove it and add
one of the same name: sessions that it began stay its own.`,
		Example: `  backstay repo serve token add web01 --role backup --repository web --dir /srv/backups > web01.token
  backstay repo serve token add desk --role restore --all-repositories --dir /srv/backups > desk.token`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := reposerver.ParseRole(role)
			if err != nil {
				return usage("--role: %w", err)
			}
			if all == (len(repos) > 0) {
				return usage("say which repositories: --repository NAME, or --all-repositories")
			}
			if all {
				repos = []string{reposerver.AllRepositories}
			}
			if err := remote.CheckTokenName(args[0]); err != nil {
				return usage("%w", err)
			}
			for _, name := range repos {
				if err := remote.CheckRepo(name); err != nil && !all {
					return usage("--repository: %w", err)
				}
			}
			return a.withTokens(cmd.Context(), *dir, true, func(ts *reposerver.Tokens) error {
				t, err := ts.Add(cmd.Context(), args[0], r, repos)
				if errors.Is(err, fault.ErrExists) {
					return withHint(err, `"backstay repo serve token remove %s" ends it`, args[0])
				}
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"name": args[0], "role": r, "repositories": repos, "token": t.Reveal(), "fingerprint": ts.Pin().String()})
				}
				fmt.Fprintln(a.stdout, t.Reveal())
				a.say("this is all there will ever be seen of it; on the client: chmod 600, and --token-file")
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&role, "role", "", "backup (store and read), restore (read) or admin (everything)")
	cmd.Flags().StringArrayVar(&repos, "repository", nil, "repository that the token is for; may be repeated")
	cmd.Flags().BoolVar(&all, "all-repositories", false, "the token is for every repository, also later ones")
	return cmd
}

func (a *app) tokenListCmd(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "show who may use the server",
		Example: `  backstay repo serve token list --dir /srv/backups`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withTokens(cmd.Context(), *dir, false, func(ts *reposerver.Tokens) error {
				list, err := ts.List(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					for _, g := range list {
						if err := a.printJSON(map[string]any{"name": g.Name, "role": g.Role, "repositories": g.Repositories, "made": g.Made}); err != nil {
							return err
						}
					}
					return nil
				}
				w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
				for _, g := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", g.Name, g.Role, strings.Join(g.Repositories, " "), g.Made.Format(time.DateOnly))
				}
				return w.Flush()
			})
		},
	}
}

func (a *app) tokenRemoveCmd(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:     "remove NAME",
		Short:   "let a client in no more",
		Example: `  backstay repo serve token remove web01 --dir /srv/backups`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withTokens(cmd.Context(), *dir, false, func(ts *reposerver.Tokens) error {
				if err := ts.Remove(cmd.Context(), args[0]); err != nil {
					return withHint(err, `"backstay repo serve token list" shows which there are`)
				}
				a.say("removed token %s; a running server takes it no more", args[0])
				return nil
			})
		},
	}
}

func (a *app) withTokens(ctx context.Context, dir string, create bool, do func(*reposerver.Tokens) error) error {
	if err := needDir(dir); err != nil {
		return err
	}
	ts, err := reposerver.OpenTokens(ctx, dir, create)
	if errors.Is(err, fault.ErrNotFound) {
		return withHint(err, "no server has ever been set up there: look at --dir")
	}
	if err != nil {
		return fmt.Errorf("tokens of %s: %w", dir, err)
	}
	defer ts.Close()
	return do(ts)
}
