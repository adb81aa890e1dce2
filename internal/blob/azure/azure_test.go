package azure

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/probe"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/fault"
)

const account = "backstaytest"

var accountKey = base64.StdEncoding.EncodeToString([]byte("not a secret: this emulator's own"))

// emulator starts Azurite and gives its host:port.
func emulator(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	return blobtest.Server{
		Program: "azurite-blob", Beside: "azurite/node_modules/.bin/azurite-blob",
		Env: []string{"AZURITE_ACCOUNTS=" + account + ":" + accountKey},
		Args: func(host, port string) []string {
			return []string{"--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", host, "--blobPort", port, "--location", dir}
		},
	}.Start(t)
}

var containers atomic.Int64

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

func byKey() func(string) string { return env(map[string]string{"AZURE_STORAGE_KEY": accountKey}) }

func open(t *testing.T, url string, getenv func(string) string, wrap func(http.RoundTripper) http.RoundTripper) *Store {
	t.Helper()
	l, err := ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	st, err := Open(t.Context(), l, Options{Getenv: getenv, Wrap: wrap})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// makeContainer makes a container and gives its URL.
func makeContainer(t *testing.T, at string) string {
	t.Helper()
	url := fmt.Sprintf("azblob+http://%s/%s/container%d", at, account, containers.Add(1))
	if _, err := open(t, url, byKey(), nil).client.Create(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return url
}

func TestStore(t *testing.T) {
	at := emulator(t)
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, makeContainer(t, at), byKey(), nil) })
	t.Run("under a prefix", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, makeContainer(t, at)+"/some/where", byKey(), nil) })
	})
	t.Run("trouble on every third request", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			st := open(t, makeContainer(t, at), byKey(), func(rt http.RoundTripper) http.RoundTripper { return blobtest.Troubled(rt, serverBusy) })
			return retry.Wrap(st, retry.Options{First: time.Millisecond, Longest: 5 * time.Millisecond})
		})
	})
	t.Run("probe", func(t *testing.T) {
		st := open(t, makeContainer(t, at), byKey(), nil)
		if err := probe.Run(t.Context(), st); err != nil {
			t.Error(err)
		}
		if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) > 0 {
			t.Errorf("the probe left %v, %v", names, err)
		}
	})
	t.Run("no container", func(t *testing.T) {
		st := open(t, "azblob+http://"+at+"/"+account+"/nowhere", byKey(), nil)
		r, n := blobtest.Body(nil)
		if err := st.Put(t.Context(), "a", r, n); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), "container nowhere") {
			t.Errorf("put: %v", err)
		}
		if err := st.Delete(t.Context(), "a"); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("delete: %v", err)
		}
	})
	t.Run("a wrong key", func(t *testing.T) {
		wrong := base64.StdEncoding.EncodeToString([]byte("another"))
		st := open(t, makeContainer(t, at), env(map[string]string{"AZURE_STORAGE_KEY": wrong}), nil)
		_, err := blobtest.Names(t.Context(), st, "")
		if !errors.Is(err, fault.ErrDenied) || strings.Contains(err.Error(), wrong) {
			t.Errorf("list: %v", err)
		}
	})
	t.Run("a signature", func(t *testing.T) {
		url := makeContainer(t, at)
		full := open(t, url, byKey(), nil)
		signed, err := full.client.GetSASURL(sas.ContainerPermissions{Read: true, Create: true, List: true}, time.Now().Add(time.Hour), &container.GetSASURLOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, token, _ := strings.Cut(signed, "?")
		file := filepath.Join(t.TempDir(), "sas")
		if err := os.WriteFile(file, []byte("?"+token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		st := open(t, url, env(map[string]string{"AZURE_STORAGE_SAS_TOKEN_FILE": file}), nil)
		r, n := blobtest.Body([]byte("hello"))
		if err := st.Create(t.Context(), "a", r, n); err != nil {
			t.Fatal(err)
		}
		if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 1 {
			t.Errorf("listed %v, %v", names, err)
		}
		if err := st.Delete(t.Context(), "a"); !errors.Is(err, fault.ErrDenied) {
			t.Errorf("what it may not do: %v", err)
		}
	})
}

func serverBusy(r *http.Request) *http.Response {
	return &http.Response{StatusCode: 503, Status: "503", Header: http.Header{"X-Ms-Error-Code": {"ServerBusy"}}, Request: r, ProtoMajor: 1, ProtoMinor: 1,
		Body: io.NopCloser(strings.NewReader(""))}
}

type answers func(*http.Request) (*http.Response, error)

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	return a(r)
}

// Whatever happens to a request, its signature is in no message.
func TestNoErrorShowsTheSignature(t *testing.T) {
	const secret = "c2lnbmVk"
	in := env(map[string]string{"AZURE_STORAGE_SAS_TOKEN": "sv=2024-01-01&sig=" + secret})
	for name, rt := range map[string]http.RoundTripper{
		"refused": nil,
		"forbidden": answers(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 403, Status: "403", Header: http.Header{}, Request: r, Body: io.NopCloser(strings.NewReader(""))}, nil
		}),
		"busy": answers(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 503, Status: "503", Header: http.Header{}, Request: r, Body: io.NopCloser(strings.NewReader(""))}, nil
		}),
		"reset": answers(func(*http.Request) (*http.Response, error) { return nil, errors.New("reset") }),
	} {
		st := open(t, "azblob+http://127.0.0.1:1/"+account+"/box", in, func(own http.RoundTripper) http.RoundTripper {
			if rt == nil {
				return own
			}
			return rt
		})
		r, n := blobtest.Body([]byte("x"))
		_, readErr := st.ReadAt(t.Context(), "a", make([]byte, 4), 0)
		_, listErr := blobtest.Names(t.Context(), st, "")
		for _, err := range []error{st.Create(t.Context(), "a", r, n), readErr, listErr, st.Delete(t.Context(), "a")} {
			if err == nil || strings.Contains(err.Error(), secret) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestCredentials(t *testing.T) {
	l := Location{Account: account, Container: "box"}
	for _, c := range []struct {
		name     string
		vars     map[string]string
		at       Location
		endpoint string // empty for an error
	}{
		{"none", nil, l, ""},
		{"a key", map[string]string{"AZURE_STORAGE_KEY": "a2V5"}, l, "https://backstaytest.blob.core.windows.net"},
		{"a connection string", map[string]string{"AZURE_STORAGE_CONNECTION_STRING": "AccountName=backstaytest;AccountKey=a2V5;EndpointSuffix=core.example"}, l, "https://backstaytest.blob.core.example"},
		{"one with an endpoint", map[string]string{"AZURE_STORAGE_CONNECTION_STRING": "AccountName=backstaytest;AccountKey=a2V5;BlobEndpoint=https://blobs.example/x"}, l, "https://blobs.example/x"},
		{"one of another account", map[string]string{"AZURE_STORAGE_CONNECTION_STRING": "AccountName=other;AccountKey=a2V5"}, l, ""},
		{"an emulator", map[string]string{"AZURE_STORAGE_KEY": "a2V5"}, Location{Host: "127.0.0.1:1", Account: account}, "http://127.0.0.1:1/backstaytest"},
		{"a file that is not there", map[string]string{"AZURE_STORAGE_KEY_FILE": "/nonexistent"}, l, ""},
	} {
		in, err := c.at.login(env(c.vars))
		if c.endpoint == "" && err == nil || c.endpoint != "" && (err != nil || in.endpoint != c.endpoint || in.key != "a2V5") {
			t.Errorf("%s: %q, %v", c.name, in.endpoint, err)
		}
	}
	// A signature does not travel in clear text, a key never does at all.
	if _, err := Open(t.Context(), Location{Host: "storage.example", Account: account, Container: "box"}, Options{Getenv: env(map[string]string{"AZURE_STORAGE_SAS_TOKEN": "sig=x"})}); err == nil {
		t.Error("a signature would have been sent over plain HTTP")
	}
	if _, err := Open(t.Context(), l, Options{Getenv: env(map[string]string{"AZURE_STORAGE_KEY": "%%secret%%"})}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a key that is none: %v", err)
	}
}

func TestParseURL(t *testing.T) {
	for url, want := range map[string]Location{
		"azblob://backups/vms":                           {Account: "backups", Container: "vms"},
		"azblob://backups/vms/a/b/":                      {Account: "backups", Container: "vms", Prefix: "a/b"},
		"azblob+http://127.0.0.1:10000/devaccount/vms/a": {Host: "127.0.0.1:10000", Account: "devaccount", Container: "vms", Prefix: "a"},
	} {
		got, err := ParseURL(url)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", url, got, err)
		}
		if again, err := ParseURL(got.String()); err != nil || again != got {
			t.Errorf("%s: %s is %+v, %v", url, got, again, err)
		}
	}
	for _, url := range []string{"azblob://", "azblob://backups", "azblob://backups/", "azblob://Backups/vms", "azblob://backups/VMs", "azblob://backups/vms?sig=hunter2",
		"azblob://key:hunter2@backups/vms", "azblob://backups/vms/../x", "azblob://backups/vms#x", "azblob+http://127.0.0.1:1/vms", "s3://backups/vms", "azblob://b%zz/vms"} {
		if l, err := ParseURL(url); err == nil {
			t.Errorf("%s was taken for %+v", url, l)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the secret: %v", url, err)
		}
	}
}
