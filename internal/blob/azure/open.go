package azure

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"

	"github.com/backstay/backstay/internal/fault"
)

// A Location is where a store's objects are.
type Location struct {
	Host      string // of an emulator, host:port; empty for Azure itself
	Account   string
	Container string
	Prefix    string // without slashes at its ends; may be empty
}

var (
	accountName   = regexp.MustCompile(`^[a-z0-9]{3,24}$`)
	containerName = regexp.MustCompile(`^[a-z0-9](-?[a-z0-9]){2,62}$`)
)

// ParseURL reads "azblob://account/container/prefix", and
// "azblob+http://host:port/account/container/prefix" for an emulator. A URL
// that holds a secret is refused: arguments can be seen by everybody on the
// machine.
func ParseURL(s string) (Location, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Location{}, errors.New("the Azure URL cannot be parsed: want azblob://account/container/prefix")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return Location{}, errors.New("an Azure URL holds no key and no signature: credentials come from the environment (AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_CONNECTION_STRING, or a file named by any of them with _FILE)")
	}
	path := strings.Trim(u.Path, "/")
	l := Location{Account: u.Host}
	switch u.Scheme {
	case "azblob":
	case "azblob+http":
		l.Host = u.Host
		l.Account, path, _ = strings.Cut(path, "/")
	default:
		return Location{}, fmt.Errorf("%s:// is no Azure URL", u.Scheme)
	}
	l.Container, l.Prefix, _ = strings.Cut(path, "/")
	switch {
	case !accountName.MatchString(l.Account):
		return Location{}, fmt.Errorf("%q is no name of a storage account: want azblob://account/container/prefix", l.Account)
	case !containerName.MatchString(l.Container):
		return Location{}, fmt.Errorf("%q is no name of a container: want azblob://account/container/prefix", l.Container)
	}
	for _, seg := range strings.Split(l.Prefix, "/") {
		if l.Prefix != "" && (seg == "" || seg == "." || seg == "..") {
			return Location{}, fmt.Errorf("prefix %q has an empty or dotted part", l.Prefix)
		}
	}
	return l, nil
}

// String is the URL of l.
func (l Location) String() string {
	u := url.URL{Scheme: "azblob", Host: l.Account, Path: "/" + l.Container}
	if l.Host != "" {
		u = url.URL{Scheme: "azblob+http", Host: l.Host, Path: "/" + l.Account + "/" + l.Container}
	}
	if l.Prefix != "" {
		u.Path += "/" + l.Prefix
	}
	return u.String()
}

// Options are for callers that have more than a URL.
type Options struct {
	// Getenv finds credentials, os.Getenv by default.
	Getenv func(string) string
	// Wrap may put a round tripper around the one that is used.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// login is what the environment says.
type login struct {
	endpoint string // of the account, with a scheme
	key      string
	sas      string
}

// Open makes a Store at l. It asks the storage nothing yet.
func Open(_ context.Context, l Location, o Options) (*Store, error) {
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	in, err := l.login(o.Getenv)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(in.endpoint)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("%s: the endpoint in AZURE_STORAGE_CONNECTION_STRING is no URL", l)
	}
	if u.Scheme == "http" && in.sas != "" && !isLoopback(u.Hostname()) {
		return nil, fmt.Errorf("%s: a signature (SAS) would be sent where everybody could read it: use https", l)
	}
	var rt http.RoundTripper = transport()
	if o.Wrap != nil {
		rt = o.Wrap(rt)
	}
	// Retrying is blob/retry's, which belongs around the store.
	options := &container.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: &http.Client{Transport: rt},
		Retry:     policy.RetryOptions{MaxRetries: -1},
		Telemetry: policy.TelemetryOptions{ApplicationID: "backstay"},
	}}
	at := strings.TrimSuffix(in.endpoint, "/") + "/" + l.Container
	var client *container.Client
	if in.sas != "" {
		client, err = container.NewClientWithNoCredential(at+"?"+in.sas, options)
	} else {
		var key *azblob.SharedKeyCredential
		if key, err = azblob.NewSharedKeyCredential(l.Account, in.key); err != nil {
			// Its message may hold a part of the key.
			return nil, fmt.Errorf("%s: the account's key is not base64: %w", l, fault.ErrDenied)
		}
		client, err = container.NewClientWithSharedKeyCredential(at, key, options)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l, withoutURL(err))
	}
	return &Store{client: client, at: l}, nil
}

func (l Location) login(getenv func(string) string) (login, error) {
	in := login{endpoint: "https://" + l.Account + ".blob.core.windows.net"}
	if l.Host != "" {
		in.endpoint = "http://" + l.Host + "/" + l.Account
	}
	secrets := map[string]string{}
	for _, name := range []string{"AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"} {
		secrets[name] = getenv(name)
		if file := getenv(name + "_FILE"); file != "" && secrets[name] == "" {
			b, err := os.ReadFile(file)
			if err != nil {
				return in, fmt.Errorf("%s_FILE: %w", name, err)
			}
			secrets[name] = strings.TrimSpace(string(b))
		}
	}
	in.key, in.sas = secrets["AZURE_STORAGE_KEY"], secrets["AZURE_STORAGE_SAS_TOKEN"]
	if s := secrets["AZURE_STORAGE_CONNECTION_STRING"]; s != "" {
		part := map[string]string{}
		for _, p := range strings.Split(s, ";") {
			name, value, _ := strings.Cut(p, "=")
			part[strings.TrimSpace(name)] = value
		}
		if part["AccountName"] != "" && part["AccountName"] != l.Account {
			return in, fmt.Errorf("%s: AZURE_STORAGE_CONNECTION_STRING is of the account %q: %w", l, part["AccountName"], fault.ErrDenied)
		}
		in.key, in.sas = part["AccountKey"], part["SharedAccessSignature"]
		switch {
		case l.Host != "": // the URL's word counts
		case part["BlobEndpoint"] != "":
			in.endpoint = part["BlobEndpoint"]
		case part["EndpointSuffix"] != "":
			in.endpoint = cmp.Or(part["DefaultEndpointsProtocol"], "https") + "://" + l.Account + ".blob." + part["EndpointSuffix"]
		}
	}
	in.sas = strings.TrimPrefix(in.sas, "?")
	if in.key != "" {
		in.sas = ""
	}
	if in.key == "" && in.sas == "" {
		return in, fmt.Errorf("no credentials for %s: set AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING, or one of them with _FILE: %w", l, fault.ErrDenied)
	}
	return in, nil
}

// transport takes as many connections as are asked for and bounds each wait
// for an answer to begin.
func transport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 128, 64
	t.ResponseHeaderTimeout = time.Minute
	t.DisableCompression = true
	return t
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
