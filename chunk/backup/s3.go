package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/cairnstore/cairn/proto/status"
)

// S3 is a Bucket in an S3-compatible store.
type S3 struct {
	c              *minio.Client
	bucket, prefix string // prefix ends with a slash, or is empty
}

var _ Bucket = (*S3)(nil)

// defaultEndpoint is used when AWS_ENDPOINT_URL is not set.
const defaultEndpoint = "https://s3.amazonaws.com"

// OpenS3 names a bucket, which must exist: s3://BUCKET[/PREFIX]. Where it is, and
// the keys, come from the environment, as for other programs.
func OpenS3(repo string) (*S3, error) {
	bucket, prefix, _ := strings.Cut(strings.TrimPrefix(repo, "s3://"), "/")
	if bucket == "" {
		return nil, status.Errorf(status.Invalid, "%q does not name a bucket: write s3://BUCKET/PREFIX", repo)
	}
	if prefix = strings.Trim(prefix, "/"); prefix != "" {
		prefix += "/"
	}
	at := os.Getenv("AWS_ENDPOINT_URL")
	if at == "" {
		at = defaultEndpoint
	}
	u, err := url.Parse(at)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, status.Errorf(status.Invalid, "AWS_ENDPOINT_URL %q is not the address of a store: write https://HOST[:PORT]", at)
	}
	if os.Getenv("AWS_ACCESS_KEY_ID") == "" {
		return nil, status.Errorf(status.Invalid, "no key for %s: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", repo)
	}
	c, err := minio.New(u.Host, &minio.Options{Creds: credentials.NewEnvAWS(), Secure: u.Scheme == "https", Region: os.Getenv("AWS_REGION")})
	if err != nil {
		return nil, fmt.Errorf("cannot use the store at %s: %w", at, err)
	}
	return &S3{c, bucket, prefix}, nil
}

func (s *S3) String() string { return strings.TrimSuffix("s3://"+s.bucket+"/"+s.prefix, "/") }

// fail says what the store says, in one sentence.
func (s *S3) fail(name string, err error) error {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		switch r.Code {
		case minio.NoSuchKey:
			return status.Errorf(status.NotFound, "there is no %s/%s", s, name)
		case minio.NoSuchBucket:
			return status.Errorf(status.Unavailable, "there is no bucket %s at %s: make it first", s.bucket, s.c.EndpointURL())
		case minio.AccessDenied, "InvalidAccessKeyId", "SignatureDoesNotMatch":
			return status.Errorf(status.Permission, "the store at %s refuses these keys for bucket %s (%s)", s.c.EndpointURL(), s.bucket, r.Code)
		}
	}
	return status.Errorf(status.Unavailable, "the store at %s does not do it for %s: %v", s.c.EndpointURL(), name, err)
}

// Put implements Bucket: an object of S3 is there whole or not at all.
func (s *S3) Put(ctx context.Context, name string, data []byte) error {
	if _, err := s.c.PutObject(ctx, s.bucket, s.prefix+name, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{}); err != nil {
		return s.fail(name, err)
	}
	return nil
}

// Get implements Bucket.
func (s *S3) Get(ctx context.Context, name string) ([]byte, error) {
	o, err := s.c.GetObject(ctx, s.bucket, s.prefix+name, minio.GetObjectOptions{})
	if err != nil {
		return nil, s.fail(name, err)
	}
	b, err := io.ReadAll(o)
	if err = errors.Join(err, o.Close()); err != nil {
		return nil, s.fail(name, err)
	}
	return b, nil
}

// Has implements Bucket.
func (s *S3) Has(ctx context.Context, name string) (bool, error) {
	_, err := s.c.StatObject(ctx, s.bucket, s.prefix+name, minio.StatObjectOptions{})
	if err != nil {
		if err = s.fail(name, err); status.Of(err) == status.NotFound {
			return false, nil
		}
	}
	return err == nil, err
}

// List implements Bucket.
func (s *S3) List(ctx context.Context, prefix string, each func(string) error) error {
	ctx, cancel := context.WithCancel(ctx) // ends the listing when each does
	defer cancel()
	for o := range s.c.ListObjects(ctx, s.bucket, minio.ListObjectsOptions{Prefix: s.prefix + prefix, Recursive: true}) {
		if o.Err != nil {
			return s.fail(prefix, o.Err)
		}
		if err := each(strings.TrimPrefix(o.Key, s.prefix)); err != nil {
			return err
		}
	}
	return nil
}

// Remove implements Bucket.
func (s *S3) Remove(ctx context.Context, name string) error {
	if err := s.c.RemoveObject(ctx, s.bucket, s.prefix+name, minio.RemoveObjectOptions{}); err != nil {
		return s.fail(name, err)
	}
	return nil
}
