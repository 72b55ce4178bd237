package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// mutualTLS is one certificate that is its own authority, for both ends.
func mutualTLS(t *testing.T) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cairn"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}},
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "127.0.0.1"}
}

// Raft, calls between peers and clients all go over TLS when configured, and a
// client without it gets nowhere.
func TestClusterOverTLS(t *testing.T) {
	conf := mutualTLS(t)
	tr := newTrio(t, func(_ int, c *Config) { c.TLS = conf })
	ctx := tr.ctx()
	c := client.New(client.Config{Addrs: tr.addrs(), TLS: conf})
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, create("v"))
	tr.agree()
	plain := tr.client()
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := plain.Query(short, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}}); !errors.Is(err, status.Unavailable) {
		t.Fatalf("a client without TLS: %v", err)
	}
}
