"""What a person looks at: findings, pictures, and trees for ArviZ."""
