package reposerver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// tlsName holds the server's key and certificate, in PEM, in one object: there
// is never one without the other.
const tlsName = "tls.pem"

// certificate reads the server's key and certificate, or makes them. Clients
// know the key by its hash, so the certificate's names and times say nothing;
// they are filled in for tools that look at them.
func certificate(ctx context.Context, state *file.Store) (tls.Certificate, error) {
	b, err := readSmall(ctx, state, tlsName)
	if errors.Is(err, fault.ErrNotFound) {
		if b, err = makeCertificate(); err != nil {
			return tls.Certificate{}, err
		}
		err = state.Create(ctx, tlsName, bytes.NewReader(b), int64(len(b)))
		if errors.Is(err, fault.ErrExists) { // another process was faster
			b, err = readSmall(ctx, state, tlsName)
		}
	}
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("the server's key: %w", err)
	}
	defer clear(b)
	cert, err := tls.X509KeyPair(b, b)
	if err != nil {
		return tls.Certificate{}, &fault.CorruptError{Object: "the server's key", Offset: -1, Err: err}
	}
	return cert, nil
}

func makeCertificate() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "backstay repository server"},
		DNSNames:     []string{"localhost"},
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(private)
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...), nil
}
