package s3

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"github.com/backstay/backstay/internal/fault"
)

// A Location is where a store's objects are.
type Location struct {
	Endpoint string // host or host:port
	Bucket   string
	Prefix   string // without slashes at its ends; may be empty
	Region   string // empty to ask the storage
	Plain    bool   // no TLS
}

// ParseURL reads "s3://endpoint/bucket/prefix", with "?region=…" where the
// storage cannot be asked, and "s3+http://…" for one without TLS. A URL that
// holds a user or a password is refused: arguments can be seen by everybody on
// the machine.
func ParseURL(s string) (Location, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Location{}, errors.New("the S3 URL cannot be parsed: want s3://endpoint/bucket/prefix")
	}
	l := Location{Endpoint: u.Host, Plain: u.Scheme == "s3+http", Region: u.Query().Get("region")}
	if u.Scheme != "s3" && u.Scheme != "s3+http" {
		return Location{}, fmt.Errorf("%s:// is no S3 URL", u.Scheme)
	}
	if u.User != nil {
		return Location{}, errors.New("an S3 URL holds no user and no password: credentials come from the environment or ~/.aws/credentials")
	}
	for key := range u.Query() {
		if key != "region" {
			return Location{}, fmt.Errorf("the S3 URL has a setting %q: the only one is region", key)
		}
	}
	l.Bucket, l.Prefix, _ = strings.Cut(strings.Trim(u.Path, "/"), "/")
	if l.Endpoint == "" || l.Bucket == "" || u.Fragment != "" {
		return Location{}, fmt.Errorf("%q names no bucket: want s3://endpoint/bucket/prefix", s)
	}
	if err := s3utils.CheckValidBucketNameStrict(l.Bucket); err != nil {
		return Location{}, fmt.Errorf("bucket %q: %w", l.Bucket, err)
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
	u := url.URL{Scheme: "s3", Host: l.Endpoint, Path: "/" + l.Bucket}
	if l.Plain && !isLoopback(l.Endpoint) {
		u.Scheme = "s3+http"
	}
	if l.Prefix != "" {
		u.Path += "/" + l.Prefix
	}
	if l.Region != "" {
		u.RawQuery = url.Values{"region": {l.Region}}.Encode()
	}
	return u.String()
}

func (l Location) prefix() string {
	if l.Prefix == "" {
		return ""
	}
	return l.Prefix + "/"
}

// Options are for callers that have more than a URL. Zero values do what the
// AWS tools do.
type Options struct {
	// Credentials are by default AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
	// then the profile AWS_PROFILE of ~/.aws/credentials, then, on AWS, the
	// role of the machine.
	Credentials *credentials.Credentials
	// Wrap may put a round tripper around the one that is used.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// Open makes a Store at l. It asks the storage nothing yet, but that of this
// machine whether it speaks TLS: what does not leave the machine needs none.
func Open(ctx context.Context, l Location, o Options) (*Store, error) {
	region := l.Region
	if region == "" {
		region = cmp.Or(os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"))
	}
	if !l.Plain && isLoopback(l.Endpoint) {
		l.Plain = speaksPlain(ctx, l.Endpoint)
	}
	transport, err := transport(!l.Plain)
	if err != nil {
		return nil, err
	}
	creds := o.Credentials
	if creds == nil {
		if creds, err = lookUp(l.Endpoint, transport); err != nil {
			return nil, err
		}
	}
	var rt http.RoundTripper = transport
	if o.Wrap != nil {
		rt = o.Wrap(rt)
	}
	client, err := minio.NewCore(l.Endpoint, &minio.Options{Creds: creds, Secure: !l.Plain, Region: region, Transport: rt, MaxRetries: 1})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l, err)
	}
	client.SetAppInfo("backstay", "1")
	return &Store{client: *client, at: l}, nil
}

// transport takes as many connections as are asked for and bounds each wait
// for an answer to begin, since a server that says nothing is the commonest
// way for one to die.
func transport(secure bool) (*http.Transport, error) {
	t, err := minio.DefaultTransport(secure)
	if err != nil {
		return nil, err
	}
	t.MaxIdleConnsPerHost = 64
	t.MaxIdleConns = 128
	t.ResponseHeaderTimeout = time.Minute
	t.DisableCompression = true
	if file := os.Getenv("AWS_CA_BUNDLE"); secure && file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("AWS_CA_BUNDLE: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("AWS_CA_BUNDLE: %s holds no certificate", file)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	return t, nil
}

// lookUp finds credentials. Only AWS has a service on a magic address that
// gives them; elsewhere asking it would take a minute to fail.
func lookUp(endpoint string, t *http.Transport) (*credentials.Credentials, error) {
	chain := []credentials.Provider{&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}}
	if strings.HasSuffix(endpoint, ".amazonaws.com") {
		chain = append(chain, &credentials.IAM{})
	}
	creds := credentials.NewChainCredentials(chain)
	v, err := creds.GetWithContext(&credentials.CredContext{Client: &http.Client{Transport: t, Timeout: 20 * time.Second}})
	if err != nil || v.AccessKeyID == "" || v.SecretAccessKey == "" {
		return nil, fmt.Errorf("no credentials for %s: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials: %w", endpoint, fault.ErrDenied)
	}
	return creds, nil
}

func isLoopback(endpoint string) bool {
	host := endpoint
	if h, _, err := net.SplitHostPort(endpoint); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// speaksPlain says whether the server answers a TLS greeting with something
// else.
func speaksPlain(ctx context.Context, endpoint string) bool {
	if _, _, err := net.SplitHostPort(endpoint); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", endpoint)
	if err != nil {
		return false // whoever uses the store will hear of it
	}
	defer conn.Close()
	// No certificate is looked at: nothing is sent over this connection.
	greeting := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	return greeting.HandshakeContext(ctx) != nil
}
