package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/azure"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/probe"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/blob/s3"
	"github.com/backstay/backstay/internal/blob/sftp"
	"github.com/backstay/backstay/internal/fault"
)

// storeAt is where --repo says the repository is: exactly one of its fields is
// set.
type storeAt struct {
	dir    string
	s3     *s3.Location
	azure  *azure.Location
	sftp   *sftp.Location
	remote *remote.Location
}

// ownDisks says whether the repository lies on disks that somebody has to look
// after, and not in a storage that heals itself and is paid by request.
func (at storeAt) ownDisks() bool { return at.dir != "" || at.sftp != nil || at.remote != nil }

func (a *app) storeAt() (storeAt, error) {
	scheme, _, isURL := strings.Cut(a.repoURL, "://")
	switch {
	case a.repoURL == "":
		return storeAt{}, coded{code: exitUsage, hint: "say --repo /path, or set BACKSTAY_REPO", err: errors.New("no repository named")}
	case !isURL:
		dir, err := filepath.Abs(a.repoURL)
		return storeAt{dir: dir}, err
	case scheme == "file":
		u, err := url.Parse(a.repoURL)
		if err != nil || u.Path == "" || u.Host != "" && u.Host != "localhost" {
			return storeAt{}, usage("%q is no file URL: want file:///path", a.repoURL)
		}
		return storeAt{dir: filepath.FromSlash(u.Path)}, nil
	case scheme == "s3" || scheme == "s3+http":
		l, err := s3.ParseURL(a.repoURL)
		if err != nil {
			return storeAt{}, usage("%w", err)
		}
		return storeAt{s3: &l}, nil
	case scheme == "azblob" || scheme == "azblob+http":
		l, err := azure.ParseURL(a.repoURL)
		if err != nil {
			return storeAt{}, usage("%w", err)
		}
		return storeAt{azure: &l}, nil
	case scheme == "sftp":
		l, err := sftp.ParseURL(a.repoURL)
		if err != nil {
			return storeAt{}, usage("%w", err)
		}
		return storeAt{sftp: &l}, nil
	case scheme == "backstay":
		l, err := remote.ParseURL(a.repoURL)
		if err != nil {
			return storeAt{}, usage("%w", err)
		}
		return storeAt{remote: &l}, nil
	}
	if why, ok := refused[scheme]; ok {
		return storeAt{}, withHint(fmt.Errorf("repository: %s:// stores: %s: %w", scheme, why[0], fault.ErrUnsupported), "%s", why[1])
	}
	return storeAt{}, withHint(fmt.Errorf("repository: %s:// stores: %w", scheme, fault.ErrUnsupported),
		"a repository is a directory, s3://endpoint/bucket/prefix, azblob://account/container/prefix, sftp://user@host/path or backstay://host:port/name")
}

// refused are the stores that people ask for and that cannot keep the promises
// of a blob.Store, or that something else reaches better; docs/design/stores.md
// has the whole reason.
var refused = map[string][2]string{
	"ftp":  {"FTP cannot create a file only where there is none, so two backups could both believe that they committed, and nothing says that a file survives a power cut", useSFTP},
	"ftps": {"FTP cannot create a file only where there is none, so two backups could both believe that they committed, and nothing says that a file survives a power cut", useSFTP},
	"smb":  {"shares are reached through the system", mountIt},
	"cifs": {"shares are reached through the system", mountIt},
	"nfs":  {"exports are reached through the system", mountIt},
}

const (
	useSFTP = "most FTP servers also speak SFTP: sftp://user@host/path"
	mountIt = "mount it and name the directory; docs/design/stores.md says with which options"
)

// openObjects opens a store of object storage.
func (at storeAt) openObjects(ctx context.Context) (st blob.Store, err error) {
	if at.azure != nil {
		st, err = azure.Open(ctx, *at.azure, azure.Options{})
	} else {
		st, err = s3.Open(ctx, *at.s3, s3.Options{})
	}
	if err != nil {
		return nil, storeHint(err) // st may be a nil pointer in an interface
	}
	return st, nil
}

// openStore opens the store that --repo names; it must exist.
func (a *app) openStore(ctx context.Context) (blob.Store, error) {
	at, err := a.storeAt()
	if err != nil {
		return nil, err
	}
	if a.asOf != "" {
		return a.openPast(ctx, at)
	}
	switch {
	case at.s3 != nil || at.azure != nil:
		st, err := at.openObjects(ctx)
		if err != nil {
			return nil, err
		}
		// What cannot be reached now is told at once: patience is for runs that
		// are under way.
		if _, err := st.Size(ctx, "repo.json"); err != nil && !errors.Is(err, fault.ErrNotFound) {
			return nil, storeHint(fmt.Errorf("repository %s: %w", st, err))
		}
		return a.patient(st), nil
	case at.sftp != nil:
		st, err := sftp.Open(ctx, *at.sftp)
		if err != nil {
			return nil, storeHint(fmt.Errorf("repository %w", err))
		}
		return a.patient(st), nil
	case at.remote != nil:
		return a.openRemote(ctx, *at.remote)
	}
	st, err := file.Open(at.dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fault.ErrNotFound) {
		return nil, withHint(fmt.Errorf("repository %s: %w", at.dir, fault.ErrNotFound), `make one with "backstay repo init --repo %s"`, at.dir)
	}
	return st, err
}

// createStore makes the store at at, or opens one that is empty.
func (a *app) createStore(ctx context.Context, at storeAt) (blob.Store, error) {
	switch {
	case at.s3 != nil || at.azure != nil:
		st, err := at.openObjects(ctx)
		if err != nil {
			return nil, err
		}
		// A wrong name or secret is told at once, without the patience of a
		// backup that has run for hours.
		if err := a.mustBeEmpty(ctx, st); err != nil {
			return nil, err
		}
		if err := probe.Run(ctx, st); err != nil {
			return nil, storeHint(fmt.Errorf("repository %s: %w", st, err))
		}
		return a.patient(st), nil
	case at.sftp != nil:
		st, err := sftp.Create(ctx, *at.sftp)
		if err != nil {
			return nil, storeHint(fmt.Errorf("repository %w", err))
		}
		if err := a.mustBeEmpty(ctx, st); err != nil {
			st.Close()
			return nil, err
		}
		return a.patient(st), nil
	case at.remote != nil:
		return a.createRemote(ctx, *at.remote)
	}
	if err := checkEmpty(at.dir); err != nil {
		return nil, err
	}
	st, err := file.Create(at.dir)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", at.dir, err)
	}
	return st, nil
}

// patient tries the store's calls again, and says so when that takes time.
func (a *app) patient(st blob.Store) blob.Store {
	return retry.Wrap(st, retry.Options{Told: func(op, name string, err error, pause time.Duration) {
		if pause > 2*time.Second {
			a.say("%s is in trouble, trying again in %s: %s %s: %s", st, pause.Round(time.Second), op, name, clean(err.Error()))
		}
	}})
}

// mustBeEmpty refuses a store that holds a repository or half of one.
func (a *app) mustBeEmpty(ctx context.Context, st blob.Store) error {
	for o, err := range st.List(ctx, "") {
		if err != nil {
			return storeHint(fmt.Errorf("repository %s: %w", st, err))
		}
		if _, err := st.Size(ctx, "repo.json"); err == nil {
			return withHint(fmt.Errorf("repository %s: %w", st, fault.ErrExists), `it is ready to use; see "backstay repo info"`)
		}
		return withHint(fmt.Errorf("%s is not empty, it holds %s: %w", st, o.Name, fault.ErrExists), "name another prefix or directory")
	}
	return nil
}

func storeHint(err error) error {
	switch {
	case errors.Is(err, fault.ErrUnsupported):
		return withHint(err, "use another storage, or a directory: no promise could be kept on this one")
	case errors.Is(err, fault.ErrNotFound):
		return withHint(err, "make the bucket first, or the container; neither is ever made by backstay, nor directories above the repository's")
	}
	return err
}

// checkEmpty refuses a directory that holds something else.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case len(entries) == 0:
		return nil
	}
	for _, e := range entries {
		if e.Name() == "repo.json" {
			return withHint(fmt.Errorf("repository %s: %w", dir, fault.ErrExists), `it is ready to use; see "backstay repo info"`)
		}
	}
	return withHint(fmt.Errorf("directory %s is not empty: %w", dir, fault.ErrExists), "name a new or an empty directory")
}
